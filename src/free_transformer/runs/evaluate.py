"""Evaluates the model of a run on held-out text, and compares a run with its baseline."""

from dataclasses import dataclass, replace

import torch
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import Rows, build_rows, read_labeled
from free_transformer.distributed.parallelize import parallelize
from free_transformer.distributed.processes import Processes, find_device
from free_transformer.errors import InputError
from free_transformer.evaluation import (
    Comparison,
    Likelihood,
    PlanExamples,
    compare,
    evaluate_likelihood,
    make_plan_examples,
)
from free_transformer.model.modeling import FreeTransformer
from free_transformer.reporting.console import stderr_console
from free_transformer.runs.evaluation_options import EvaluationOptions
from free_transformer.runs.run import Run

__all__ = [
    "EvaluationOptions",
    "LoadedRun",
    "RunComparison",
    "RunEvaluation",
    "compare_runs",
    "evaluate_run",
    "load_for_evaluation",
    "plan_examples_of",
]


@dataclass(frozen=True)
class RunEvaluation:
    """
    Attributes:
        likelihood: likelihood of the text, in nats per token.
        bytes_per_token: mean number of UTF-8 bytes per token. Divide nats per token by it to get nats per byte.
    """

    likelihood: Likelihood
    bytes_per_token: float


@dataclass(frozen=True)
class LoadedRun:
    """The model of a run, its tokenizer, the rows to evaluate it on, and the processes that share the work."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    processes: Processes


@dataclass(frozen=True)
class RunComparison:
    """
    Attributes:
        comparison: comparison of both runs, in nats per token.
        bytes_per_token: as in `RunEvaluation`.
    """

    comparison: Comparison
    bytes_per_token: float


def load_for_evaluation(
    run: Run, settings: EvaluationOptions | None = None, processes: Processes | None = None
) -> LoadedRun:
    """Loads the model and text for `evaluate_run`, with the same arguments and errors."""
    settings = settings or EvaluationOptions()
    model, tokenizer = run.load_with_tokenizer()
    processes = processes or Processes(find_device(run.settings.training.device))
    parallelize(model, processes)
    rows = run.held_out_rows(tokenizer, list(settings.data)).sample(settings.max_rows, settings.seed)
    return LoadedRun(model, tokenizer, rows, processes)


def evaluate_run(
    run: Run,
    settings: EvaluationOptions | None = None,
    processes: Processes | None = None,
    quiet: bool = False,
    loaded: LoadedRun | None = None,
) -> RunEvaluation:
    """
    Evaluates the likelihood of held-out text. `Run.write_evaluation` saves the result.

    Args:
        settings: default: `EvaluationOptions()`.
        processes: processes that share the work, from `join_processes`; all get the same result. Default:
            this process, on the device of the run's settings.
        quiet: show no progress bar.
        loaded: result of `load_for_evaluation` for these arguments, which is called by default.

    Raises:
        SettingsError: for a folder that is not a run or has no model, and without held-out text.
        InputError: for text that cannot be read, an unknown method or prior, or too many plans for `"exact"`.
    """
    settings = settings or EvaluationOptions()
    loaded = loaded or load_for_evaluation(run, settings, processes)
    rows, processes = loaded.rows, loaded.processes
    torch.manual_seed(settings.seed)
    batches = track(
        rows.in_order(settings.batch_size),
        description=f"evaluate {run.path.name}",
        total=-(-len(rows) // settings.batch_size),
        console=stderr_console(quiet or not processes.main),
    )
    likelihood = evaluate_likelihood(
        loaded.model, batches, settings.num_samples, settings.method, settings.prior, processes.data_group
    )
    return RunEvaluation(likelihood, rows.bytes_per_token)


def plan_examples_of(run: Run, loaded: LoadedRun, settings: EvaluationOptions) -> PlanExamples | None:
    """
    Generates examples of what the plans of a run do; `Run.write_examples` saves them.

    Returns None for a baseline, and with several processes, since the model may be sharded across them.
    """
    if not isinstance(loaded.model, FreeTransformer) or loaded.processes.size > 1:
        return None
    data = run.settings.data
    labeled = read_labeled(list(settings.data) or data.validation, data.column)
    seq_len = run.settings.training.seq_len
    by_source = {label: build_rows(texts, loaded.tokenizer, seq_len) for label, texts in labeled.items()}
    return make_plan_examples(loaded.model, loaded.tokenizer, loaded.rows, by_source, settings.seed)


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
        InputError: unless `run` is a Free Transformer and `baseline` a baseline, with equal tokenizers and row lengths.
        SettingsError: as `evaluate_run`.
    """
    settings = settings or EvaluationOptions()
    if (run.settings.model.kind, baseline.settings.model.kind) != ("free", "baseline"):
        raise InputError("compare needs a Free Transformer (model.kind=free), then a baseline (model.kind=baseline)")
    if run.load_tokenizer().get_vocab() != baseline.load_tokenizer().get_vocab():
        raise InputError(
            f"{run.path} and {baseline.path} have different tokenizers: their losses cannot be compared; train both "
            "with the same data.tokenizer"
        )
    settings = replace(settings, data=settings.data or tuple(run.settings.data.validation))
    ours, theirs = (evaluate_run(each, settings, processes, quiet) for each in (run, baseline))
    return RunComparison(compare(ours.likelihood, theirs.likelihood), ours.bytes_per_token)
