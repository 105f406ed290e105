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
from free_transformer.cli.output import print_line, print_table, print_verdict
from free_transformer.files import check_own_results
from free_transformer.runs.evaluation_options import EvaluationOptions

NARROW_COLUMNS = (0, 1, 2, 4)  # without explanations, which are in the report


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

    With one process it also saves texts under several plans, the effect of each bit, and the plans of each source in
    `RUN/plan_examples.json`, which `report` shows. Sources are determined from a column `source` or `label`, or from
    the names of several files.

    Examples:

    - `free-transformer evaluate runs/my-run`
    - `free-transformer evaluate runs/my-run --data other.txt`
    """
    from free_transformer.cli.processes import evaluation_processes
    from free_transformer.reporting.report import likelihood_table, usage_table
    from free_transformer.runs.evaluate import evaluate_run, load_for_evaluation, plan_examples_of
    from free_transformer.runs.run import Run
    from free_transformer.runs.verdict import verdict_of

    evaluated = Run.open(run)
    check_own_results(evaluated.evaluation_file, "nll")
    check_own_results(evaluated.examples_file, "texts")
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
        loaded = load_for_evaluation(evaluated, options, processes)
        result = evaluate_run(evaluated, options, processes, loaded=loaded)
    if not processes.main:
        return
    likelihood = result.likelihood
    evaluated.write_evaluation(likelihood, result.bytes_per_token, data)  # first, since the next step may fail
    if (examples := plan_examples_of(evaluated, loaded, options)) is not None:
        evaluated.write_examples(examples)
    print_table(likelihood_table(likelihood, result.bytes_per_token).columns(*NARROW_COLUMNS))
    print_table(usage_table(likelihood))
    print_line(f"{likelihood.documents} texts, {likelihood.tokens} tokens; saved to {evaluated.evaluation_file}")
    print_verdict(verdict_of(evaluated))
