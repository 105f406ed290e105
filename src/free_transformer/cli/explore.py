"""`free-transformer explore`."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli import output
from free_transformer.cli.options import DataOption, ModelArgument, OverwriteOption
from free_transformer.cli.packages import optional_packages
from free_transformer.files import check_replaceable


def explore(
    run: ModelArgument,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run or model without a plan to compare with. Default: RUN/baseline or RUN-baseline."
        ),
    ] = None,
    data: DataOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 7860,
    name: Annotated[
        str | None, typer.Option(help="Name of the model on the page. Default: the name of the folder.")
    ] = None,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    space: Annotated[
        Path | None,
        typer.Option(help="Folder to create for a Hugging Face Space, instead of opening the page.", metavar="FOLDER"),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Open a page to explore the plans of a model: grids of texts, switches for bits, and a map of plans.

    Examples:

    - `free-transformer explore runs/my-run`
    - `free-transformer explore runs/my-run --baseline runs/another --port 9000`
    - `free-transformer explore runs/my-run --space my-space`
    """
    with optional_packages("the page needs", "explore"):
        from free_transformer.explorer.app import SURVEY_SECONDS, serve_explorer
        from free_transformer.explorer.sources import open_model, survey
        from free_transformer.explorer.space import write_space

    opened = open_model(run, baseline, data or (), name)
    status = output.status(f"loading {run}")

    def progress(read: int) -> None:
        status.update(f"read the plans of {read} held-out texts")

    def on_ready(link: str) -> None:
        status.stop()
        output.print_line(f"{opened.name}: {link} (Ctrl-C to stop)")
        if browser:
            typer.launch(link)

    if space is not None:
        check_replaceable(space, "space", overwrite, [run])
    with status:
        if space is None:
            serve_explorer(opened, host, port, progress, on_ready)
            return
        write_space(opened, survey(opened, opened.build(), SURVEY_SECONDS, progress), space, overwrite)
    output.print_line(f"saved to {space}; to publish it: hf upload OWNER/NAME {space} --repo-type space")
