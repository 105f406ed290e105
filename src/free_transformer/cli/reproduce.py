"""`free-transformer reproduce`: one command per experiment."""

import os
from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli.output import print_line, print_table

reproduce = typer.Typer(no_args_is_help=True, help="Reproduce experiments of the paper.")


@reproduce.command()
def letters(
    out: Annotated[Path, typer.Option(help="Folder of the models, results and report.")] = Path("letters"),
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of runs per model, at least 1. The documentation uses 3.")
    ] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps per model, at least 1.")] = 900,
    processes: Annotated[
        int,
        typer.Option(min=1, help="Number of models trained at the same time, one thread each."),
    ] = os.cpu_count() or 1,
    groups: Annotated[
        int, typer.Option(min=1, help="Number of groups of 16 strings that each model generates, at least 1.")
    ] = 64,
) -> None:
    """
    Reproduce the letters task: content and cost of plans with 1/64 to 8 bits per token, reported in `OUT/report.html`.

    Examples:

    - `free-transformer reproduce letters --seeds 3`
    """
    from free_transformer.reproduce.letters import reproduce_letters
    from free_transformer.reproduce.letters_report import finding_table, write_letters_report

    results = reproduce_letters(out, seeds, steps, processes, groups)
    print_table(finding_table(results))
    print_line(f"report: {write_letters_report(results, out)}")
