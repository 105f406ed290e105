"""`free-transformer report`."""

from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli.options import OverwriteOption, RunsArgument
from free_transformer.cli.output import print_line
from free_transformer.files import check_own_file


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the report. Default: report.html in RUN; for several runs, in the folder that contains them."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Create an HTML report of one or more runs, even during training: verdict, warnings, curves and settings.

    After `evaluate` it also shows the likelihood, texts under several plans and the effect of each bit. After `compare`
    it shows the difference from the baseline.

    Examples:

    - `free-transformer report runs/my-run`
    - `free-transformer report runs/a runs/b --out both.html`
    """
    from free_transformer.runs.report import write_run_report

    if out is not None:
        check_own_file(out, overwrite)
    print_line(f"report: {write_run_report(*runs, out=out)}")
