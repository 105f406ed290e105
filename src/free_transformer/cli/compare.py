"""`free-transformer compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from free_transformer.cli.options import (
    BatchOption,
    DataOption,
    MethodOption,
    NumPlansOption,
    PriorOption,
    RowsOption,
    RunArgument,
    SeedOption,
)
from free_transformer.cli.output import print_table, print_verdict
from free_transformer.files import check_own_results
from free_transformer.reporting.table import Table
from free_transformer.runs.evaluation_options import EvaluationOptions

if TYPE_CHECKING:
    from free_transformer.evaluation import Comparison


def compare(
    run: RunArgument,
    baseline_run: Annotated[
        Path,
        typer.Argument(help="Folder of the baseline's run, created by `train --baseline`.", metavar="BASELINE_RUN"),
    ],
    data: DataOption = None,
    num_plans: NumPlansOption = EvaluationOptions.num_samples,
    method: MethodOption = EvaluationOptions.method,
    prior: PriorOption = EvaluationOptions.prior,
    max_rows: RowsOption = EvaluationOptions.max_rows,
    batch_size: BatchOption = EvaluationOptions.batch_size,
    seed: SeedOption = EvaluationOptions.seed,
) -> None:
    """
    Compare the likelihood of a run with its baseline on the same text, and save the result in `RUN/comparison.json`.

    Examples:

    - `free-transformer compare runs/my-run runs/my-run-baseline`
    """
    from free_transformer.cli.processes import evaluation_processes
    from free_transformer.runs.evaluate import compare_runs
    from free_transformer.runs.run import Run
    from free_transformer.runs.verdict import verdict_of

    free = Run.open(run)
    check_own_results(free.comparison_file, "difference")
    options = EvaluationOptions(
        data=tuple(data or ()),
        num_samples=num_plans,
        method=method,
        prior=prior,
        max_rows=max_rows,
        batch_size=batch_size,
        seed=seed,
    )
    with evaluation_processes() as processes:
        baseline = Run.open(baseline_run)
        result = compare_runs(free, baseline, options, processes)
    if not processes.main:
        return
    free.write_comparison(result.comparison, result.bytes_per_token, baseline.name, method)
    rows = _rows(result.comparison, result.bytes_per_token)
    print_table(Table(["", "nats per token", "nats per byte"], rows, "± one standard error"))
    print_verdict(verdict_of(free))


def _rows(result: "Comparison", bytes_per_token: float) -> list[list[str]]:
    def row(title: str, value: float, style: str, error: float | None = None) -> list[str]:
        cells = [title]
        for scale in (1.0, bytes_per_token):
            margin = "" if error is None else f" ± {error / scale:.4f}"
            cells.append(f"{value / scale:{style}}{margin}")
        return cells

    return [
        row("nll, baseline", result.baseline_nll, ".4f"),
        row("nll, free", result.nll, ".4f"),
        row("difference", result.difference, "+.4f", result.standard_error),
        row("difference of the elbo", result.elbo_difference, "+.4f"),
    ]
