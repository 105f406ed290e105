"""`free-transformer evaluate`."""

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
from free_transformer.cli.output import print_line, print_table, print_warning
from free_transformer.files import check_own_results
from free_transformer.runs.evaluation_options import EvaluationOptions

NARROW_COLUMNS = (0, 1, 2, 4)  # the explanations are in the report; a terminal is too narrow for them


def evaluate(
    run: RunArgument,
    data: DataOption = None,
    num_plans: NumPlansOption = EvaluationOptions.num_samples,
    method: MethodOption = EvaluationOptions.method,
    prior: PriorOption = EvaluationOptions.prior,
    max_rows: RowsOption = EvaluationOptions.max_rows,
    batch_size: BatchOption = EvaluationOptions.batch_size,
    seed: SeedOption = EvaluationOptions.seed,
) -> None:
    """
    Evaluate the likelihood of held-out text and whether the plan is used, and save both in `RUN/metrics.json`.

    Examples:

    - `free-transformer evaluate runs/my-run`
    - `free-transformer evaluate runs/my-run --data other.txt`
    """
    from free_transformer.cli.processes import evaluation_processes
    from free_transformer.reporting.report import likelihood_table, usage_table
    from free_transformer.runs.evaluate import evaluate_run
    from free_transformer.runs.run import Run

    evaluated = Run.open(run)
    check_own_results(evaluated.evaluation_file, "nll")
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
        result = evaluate_run(evaluated, options, processes)
    if not processes.main:
        return
    likelihood = result.likelihood
    warning = evaluated.write_evaluation(likelihood, result.bytes_per_token, data)  # before output that may fail
    print_table(likelihood_table(likelihood, result.bytes_per_token).columns(*NARROW_COLUMNS))
    print_table(usage_table(likelihood))
    if warning:
        print_warning(warning)
    print_line(f"{likelihood.documents} texts, {likelihood.tokens} tokens; saved to {evaluated.evaluation_file}")
