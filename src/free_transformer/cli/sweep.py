"""`free-transformer sweep`."""

from typing import Annotated

import typer

from free_transformer.cli.options import ConfigArgument
from free_transformer.cli.output import print_line, print_table, print_warning
from free_transformer.errors import RunError


def sweep(
    config: ConfigArgument,
    more: Annotated[
        list[str] | None,
        typer.Argument(help="Further settings of the grid, as for --grid.", metavar="[SECTION.NAME=VALUE,VALUE]..."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings to vary, such as model.latent_dim=8,16 training.seed=0,1,2; a single value applies to all "
            "runs."
        ),
    ] = None,
) -> None:
    """
    Train and evaluate a run for every combination of the given settings, and print a table of means over seeds.

    Examples:

    - `free-transformer sweep config.yaml --grid model.latent_dim=8,16 training.seed=0,1,2`
    """
    from free_transformer.settings import override_warnings
    from free_transformer.training.sweep import load_sweep, run_sweep
    from free_transformer.training.sweep_summary import sweep_table

    loaded = load_sweep(config, [*(grid or []), *(more or [])])
    first = loaded.runs[0]
    overrides = [f"{name}={value}" for name, value in first.overrides.items()]
    for warning in override_warnings(first.settings, overrides, config):
        print_warning(warning)
    run_sweep(loaded)
    print_table(sweep_table(loaded))
    print_line(f"report: {loaded.folder / 'report.html'}")
    if loaded.failed:
        names = ", ".join(run.name for run in loaded.failed)
        raise RunError(
            f"{len(loaded.failed)} of {len(loaded.runs)} runs failed: {names}; see sweep.json for the reasons"
        )
