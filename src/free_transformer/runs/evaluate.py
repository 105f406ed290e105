"""Evaluates the model of a run on held-out text, and compares a run with its baseline."""

from dataclasses import dataclass, replace

import torch
from rich.progress import track

from free_transformer.distributed.parallelize import parallelize
from free_transformer.distributed.processes import Processes, find_device
from free_transformer.errors import InputError
from free_transformer.evaluation import Comparison, Likelihood, compare, evaluate_likelihood
from free_transformer.reporting.console import stderr_console
from free_transformer.runs.evaluation_options import EvaluationOptions
from free_transformer.runs.run import Run

__all__ = ["EvaluationOptions", "RunComparison", "RunEvaluation", "compare_runs", "evaluate_run"]


@dataclass(frozen=True)
class RunEvaluation:
    """
    Attributes:
        likelihood: in nats per token.
        bytes_per_token: mean number of UTF-8 bytes per token of the text; divides nats per token into nats per byte.
    """

    likelihood: Likelihood
    bytes_per_token: float


@dataclass(frozen=True)
class RunComparison:
    """
    Attributes:
        comparison: in nats per token.
        bytes_per_token: as in `RunEvaluation`.
    """

    comparison: Comparison
    bytes_per_token: float


def evaluate_run(
    run: Run, settings: EvaluationOptions | None = None, processes: Processes | None = None, quiet: bool = False
) -> RunEvaluation:
    """
    Evaluates the likelihood of held-out text. It does not create any files: see `Run.write_evaluation`.

    Args:
        settings: default: `EvaluationOptions()`.
        processes: processes that share the work, as `join_processes` returns them; all get the same result. Default:
            this process, on the device of the run's settings.
        quiet: no progress bar on standard error.

    Raises:
        SettingsError: for a folder that is not a run or has no model, and without held-out text.
        InputError: for text that cannot be read, an unknown method or prior, or too many plans for `"exact"`.
    """
    settings = settings or EvaluationOptions()
    model, tokenizer = run.load_with_tokenizer()
    processes = processes or Processes(find_device(run.settings.training.device))
    parallelize(model, processes)
    rows = run.held_out_rows(tokenizer, list(settings.data)).sample(settings.max_rows, settings.seed)
    torch.manual_seed(settings.seed)
    batches = track(
        rows.in_order(settings.batch_size),
        description=f"evaluate {run.path.name}",
        total=-(-len(rows) // settings.batch_size),
        console=stderr_console(quiet or not processes.main),
    )
    likelihood = evaluate_likelihood(
        model, batches, settings.num_samples, settings.method, settings.prior, processes.data_group
    )
    return RunEvaluation(likelihood, rows.bytes_per_token)


def compare_runs(
    run: Run,
    baseline: Run,
    settings: EvaluationOptions | None = None,
    processes: Processes | None = None,
    quiet: bool = False,
) -> RunComparison:
    """
    Evaluates a Free Transformer and its baseline on the same text, and compares their likelihoods.

    Args:
        settings, processes, quiet: as for `evaluate_run`; the default text is the `data.validation` of `run`.

    Raises:
        InputError: for runs of other kinds, or with different tokenizers or row lengths.
        SettingsError: as `evaluate_run`.
    """
    settings = settings or EvaluationOptions()
    if (run.settings.model.kind, baseline.settings.model.kind) != ("free", "baseline"):
        raise InputError("compare takes a run of kind free, then one of kind baseline")
    if run.load_tokenizer().get_vocab() != baseline.load_tokenizer().get_vocab():
        raise InputError(
            f"{run.path} and {baseline.path} have different tokenizers: their losses cannot be compared; train both "
            "with the same data.tokenizer"
        )
    settings = replace(settings, data=settings.data or tuple(run.settings.data.validation))
    ours, theirs = (evaluate_run(each, settings, processes, quiet) for each in (run, baseline))
    return RunComparison(compare(ours.likelihood, theirs.likelihood), ours.bytes_per_token)
