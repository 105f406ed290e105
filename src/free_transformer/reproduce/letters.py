"""
The paper's letters experiment (arXiv:2510.17558, section 4.1), with additional measurements.

Seven models are trained on the same strings: one plan per token with 1/64, 1/8, 1, 2 and 8 free bits (the paper has all
of these but 2), one plan of 6 bits per string, and no plan. Each is trained on the 64 characters after the prompt.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from queue import Empty, Queue
from typing import TypedDict

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from free_transformer.data import begin_token, load_tokenizer
from free_transformer.data.letters import LENGTH, sample_string
from free_transformer.errors import InputError
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.files import claimed_folder, new_folder, write_text
from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.model.initialization import build_baseline
from free_transformer.model.layout import num_plans
from free_transformer.model.losses import IGNORED
from free_transformer.model.modeling import FreeTransformer
from free_transformer.reproduce.strings import Groups, measure_groups, prompts
from free_transformer.settings import Settings
from free_transformer.settings.curriculum import scheduled_weights
from free_transformer.training.optimizers import build_optimizers, clip_gradients, set_learning_rate
from free_transformer.training.step import training_forward

GROUPS, GROUP_SIZE = 64, 16
SHOWN_GROUPS, SHOWN_STRINGS = 3, 8
HELD_OUT_BATCHES = 4  # each with one string per group
PROMPT = 3  # tokens: begin-of-text, the letter, ">"
HELD_OUT_SEED = 1_000_003
PRIOR_STRINGS = 1024
PROGRESS_EVERY = 10


class ModelChanges(TypedDict, total=False):
    """Fields of `FreeTransformerConfig` that a variant sets."""

    plan_span: int | str
    latent_dim: int
    free_bits: float
    hidden_dim: int
    readout_init_scale: float
    aggregate_weight: float


class TrainingChanges(TypedDict, total=False):
    """Fields of `TrainingSettings` that a variant sets."""

    max_steps: int
    kl_schedule: str
    free_bits_schedule: str
    free_bits_start: float


@dataclass(frozen=True)
class Variant:
    """
    One of the models.

    Attributes:
        name: name of its folder.
        title: its name in the report.
        model: configuration of its plan, and changes to the size that all models share. None for the baseline.
        training: changes to the training settings that all models share.
    """

    name: str
    title: str
    model: ModelChanges | None = field(default=None, hash=False)
    training: TrainingChanges = field(default_factory=TrainingChanges, hash=False)

    def steps(self, shared: int) -> int:
        """Returns the number of training steps, `shared` unless the variant changes it."""
        return self.training.get("max_steps", shared)


def _per_token(name: str, title: str, free_bits: float) -> Variant:
    return Variant(name, title, {"plan_span": 1, "latent_dim": 8, "free_bits": free_bits})


VARIANTS = (
    _per_token("1_64", "1/64 bit per token", 1 / 64),
    _per_token("1_8", "1/8 bit per token", 1 / 8),
    _per_token("1", "1 bit per token", 1.0),
    _per_token("2", "2 bits per token", 2.0),
    _per_token("8", "8 bits per token", 8.0),
    Variant("sequence", "6 bits per string", {"plan_span": "sequence", "latent_dim": 6, "free_bits": 6.0}),
    Variant("baseline", "no plan"),
)

Progressed = tuple[tuple[Variant, int], int, str]  # variant and seed, steps so far, status


@dataclass
class Result:
    """
    Results of one model and seed. Losses are in nats per string of 64 characters. None without a plan.

    Attributes:
        nll: upper bound of the negative log-likelihood from 16 importance-weighted plans.
        independent: strings whose groups share the letter only; each string has its own plan from the uniform prior.
        kl: KL of the posterior from the prior, in bits per string.
        nll_filter: bound from a particle filter with 16 particles; exact for one plan per string.
        nll_aggregate: as `nll_filter`, with plans from the aggregate prior.
        shared: strings whose groups share the letter and the plan.
        aggregate: as `independent`, with plans from the aggregate prior.
        texts: some strings of `independent`, `shared` and `aggregate`, for the report.
    """

    variant: str
    seed: int
    steps: int
    nll: float
    independent: Groups
    reconstruction: float | None = None
    prior: float | None = None
    elbo: float | None = None
    kl: float | None = None
    nll_filter: float | None = None
    nll_aggregate: float | None = None
    shared: Groups | None = None
    aggregate: Groups | None = None
    texts: dict[str, list[str]] = field(default_factory=dict)


def reproduce_letters(
    out: Path,
    seeds: int = 1,
    steps: int = 900,
    processes: int = 2,
    groups: int = GROUPS,
    variants: Sequence[Variant] = VARIANTS,
) -> list[Result]:
    """
    Trains and measures the models whose results are not in `out` yet, several at a time with one thread each.

    Args:
        out: folder of the models and their results.
        seeds: number of runs per variant.
        steps: training steps per model.
        processes: number of models trained at a time.
        groups: number of groups of strings that each model generates.

    Raises:
        InputError: if `out` contains results of another number of steps, or is not a folder of this experiment.
    """
    with claimed_folder(out, "reproduction", ["report.html", *(f"seed{seed}" for seed in range(seeds))]):
        return _reproduce(out, seeds, steps, processes, groups, variants)


def _reproduce(
    out: Path, seeds: int, steps: int, processes: int, groups: int, variants: Sequence[Variant]
) -> list[Result]:
    jobs = [(variant, seed) for seed in range(seeds) for variant in variants]
    for folder in (_folder(out, *job) for job in jobs):
        if (folder / "result.json").is_file() and read_result(folder).steps != steps:
            raise InputError(
                f"{folder}: was trained for {read_result(folder).steps} steps, not {steps}; choose another --out"
            )
    missing = [job for job in jobs if not (_folder(out, *job) / "result.json").is_file()]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    context = get_context("spawn")
    with Progress(*columns, TimeRemainingColumn()) as progress, context.Manager() as manager:
        queue: Queue[Progressed] = manager.Queue()
        bars = {
            (variant, seed): progress.add_task(
                f"{variant.title}, seed {seed}", total=variant.steps(steps), numbers="", start=False
            )
            for variant, seed in missing
        }
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = [pool.submit(_run, out, *job, steps, groups, queue) for job in missing]
            while not all(future.done() for future in futures):
                with contextlib.suppress(Empty):
                    job, step, numbers = queue.get(timeout=0.5)
                    progress.start_task(bars[job])
                    progress.update(bars[job], completed=step, numbers=numbers)
            for future in futures:
                future.result()
    return [read_result(_folder(out, *job)) for job in jobs]


def _folder(out: Path, variant: Variant, seed: int) -> Path:
    return out / f"seed{seed}" / variant.name


def read_result(folder: Path) -> Result:
    """Reads `result.json` of a model's folder."""
    values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for name in ("shared", "independent", "aggregate"):
        values[name] = values[name] and Groups(**values[name])
    return Result(**values)


def _run(out: Path, variant: Variant, seed: int, steps: int, groups: int, queue: "Queue[Progressed]") -> None:
    """Trains, measures and saves one model, in its own process."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    job = (variant, seed)
    model = train_variant(variant, seed, steps, lambda step, text: queue.put((job, step, text)))
    queue.put((job, variant.steps(steps), "measuring"))
    result = measure(model, variant, seed, steps, groups)
    folder = _folder(out, variant, seed)
    with new_folder(folder / "model") as model_folder:
        model.save_pretrained(model_folder)
    write_text(folder / "result.json", json.dumps(asdict(result), indent=1) + "\n")
    queue.put((job, variant.steps(steps), "done"))


def batches_of(seed: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yields an endless stream of batches of new strings. The labels exclude the prompt."""
    rng = np.random.default_rng(seed)
    begin = begin_token(load_tokenizer("bytes"))
    while True:
        texts = np.frombuffer("".join(sample_string(rng) for _ in range(batch_size)).encode(), np.uint8)
        tokens = np.full((batch_size, LENGTH + PROMPT), begin)
        tokens[:, 1:] = texts.reshape(batch_size, -1)
        labels = tokens.copy()
        labels[:, :PROMPT] = IGNORED
        yield {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def build_variant(variant: Variant) -> PreTrainedModel:
    """Builds the model of a variant, with random weights."""
    tokenizer = load_tokenizer("bytes")
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_dim": 64,
        "num_layers": 4,
        "num_heads": 4,
        "max_seq_len": LENGTH + PROMPT,
        "bos_token_id": begin_token(tokenizer),
        "eos_token_id": None,  # strings end after 64 characters
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = FreeTransformerConfig(**{**shared, **(variant.model or {})})
    return FreeTransformer(config) if variant.model else build_baseline(config)


def train_variant(
    variant: Variant, seed: int, steps: int, progress: Callable[[int, str], None] | None = None
) -> PreTrainedModel:
    """Trains a model and returns it in evaluation mode. All variants of a seed are trained on the same strings."""
    torch.manual_seed(seed)
    model = build_variant(variant)
    shared = {
        "max_steps": steps,
        "batch_size": 64,
        "seq_len": LENGTH + PROMPT,
        "warmup_steps": min(50, steps // 2),
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "muon_learning_rate": 0.02,
        "min_lr_ratio": 0.02,
    }
    objective = {"free_bits": variant.model["free_bits"], "min_bits": 0.0} if variant.model else {}
    settings = Settings.model_validate({"training": {**shared, **variant.training}, "model": objective})
    training = settings.training
    optimizers = build_optimizers(model, settings)
    batches = batches_of(seed, training.rows)
    for step in range(training.max_steps):
        set_learning_rate(optimizers, step, settings)
        weights = scheduled_weights(settings, step) if variant.model else None
        losses = training_forward(model, next(batches), training.rows * LENGTH, weights)
        losses["loss"].backward()
        clip_gradients(model.parameters(), training.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if progress and step % PROGRESS_EVERY == 0:
            progress(step, f"reconstruction {float(losses['reconstruction'].detach()) * LENGTH:.1f} nats")
    if variant.model:
        prior_batches = batches_of(seed + HELD_OUT_SEED + 1, 64)
        model.gather_prior(next(prior_batches) for _ in range(PRIOR_STRINGS // 64))
    return model.eval()


@torch.no_grad()
def measure(model: PreTrainedModel, variant: Variant, seed: int, steps: int, groups: int = GROUPS) -> Result:
    """Evaluates the likelihood of held-out strings, then generates groups of strings and measures them."""
    torch.manual_seed(seed)
    held_out = batches_of(HELD_OUT_SEED, groups)
    batches = [next(held_out) for _ in range(HELD_OUT_BATCHES)]
    likelihood = evaluate_likelihood(model, batches, 16)
    nll = likelihood.nll * LENGTH
    if variant.model is None:
        alone, texts = _generate(model, None, seed, groups)
        return Result(variant.name, seed, steps, nll, alone, texts={"independent": texts})
    span = variant.model["plan_span"]
    method, plans = "exact" if span == "sequence" else "particle_filter", num_plans(span, LENGTH + PROMPT)
    sampled = {
        "independent": model.sample_plan(groups * GROUP_SIZE, plans),
        "shared": model.sample_plan(groups, plans).repeat_interleave(GROUP_SIZE, 0),
        "aggregate": model.sample_plan(groups * GROUP_SIZE, plans, prior="aggregate"),
    }
    generated = {name: _generate(model, plan, seed, groups) for name, plan in sampled.items()}
    result = Result(variant.name, seed, steps, nll, generated["independent"][0])
    result.shared, result.aggregate = generated["shared"][0], generated["aggregate"][0]
    result.texts = {name: texts for name, (_, texts) in generated.items()}
    for name in ("reconstruction", "prior", "elbo"):
        setattr(result, name, getattr(likelihood, name) * LENGTH)
    assert likelihood.kl_per_token is not None
    result.kl = likelihood.kl_per_token * LENGTH
    result.nll_filter = evaluate_likelihood(model, batches, 16, method).nll * LENGTH
    result.nll_aggregate = evaluate_likelihood(model, batches, 16, method, "aggregate").nll * LENGTH
    return result


def _generate(model: PreTrainedModel, plan: Tensor | None, seed: int, groups: int) -> tuple[Groups, list[str]]:
    """Generates groups of strings from the same prompts for all models. Returns measurements and some strings."""
    prompt = prompts(groups, GROUP_SIZE, model.config.bos_token_id, seed)
    arguments: dict[str, Tensor] = {} if plan is None else {"plan": plan}
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LENGTH, do_sample=True, top_k=0, **arguments
    ).numpy()
    strings, letters = tokens[:, PROMPT:], tokens[:, 1]
    shown = [
        "".join(chr(character) if 32 <= character < 127 else "?" for character in strings[group * GROUP_SIZE + row])
        for group in range(min(SHOWN_GROUPS, groups))
        for row in range(SHOWN_STRINGS)
    ]
    return measure_groups(strings, letters, GROUP_SIZE), shown
