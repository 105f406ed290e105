"""`free-transformer watch`."""

from typing import Annotated

import typer

from free_transformer.cli.options import RunsArgument


def watch(
    runs: RunsArgument,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates, at least 0.1.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show the current state and exit.")] = False,
) -> None:
    """
    Show the curves and metrics of runs in the terminal while they train, with advice.

    Examples:

    - `free-transformer watch runs/my-run`
    - `free-transformer watch runs/a runs/b --once`
    """
    from free_transformer.runs.watch import watch as watch_runs

    watch_runs(runs, every, once)
