"""The training loop: settings in, a run's folder out."""

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import Rows, begin_token, build_rows, load_tokenizer, read_documents, streamed_batches
from free_transformer.data.rows import Batch
from free_transformer.evaluation.likelihood import baseline_inputs, evaluate_likelihood
from free_transformer.evaluation.usage import collapse_warning
from free_transformer.files import new_folder
from free_transformer.losses import predicted_tokens
from free_transformer.model import FreeTransformer, build_baseline
from free_transformer.training.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from free_transformer.training.display import Display
from free_transformer.training.optimizers import build_optimizers, clip_gradients, set_learning_rate, table_optimizer
from free_transformer.training.run import Run
from free_transformer.training.schedules import scheduled_weights
from free_transformer.training.settings import Settings, SettingsError

VALIDATION_SAMPLES = 4
WATCHED_FROM = 0.1  # of the steps: a plan is seldom used sooner


class TrainingFailed(RuntimeError):
    """A run that cannot go on, such as one whose loss is no number any more."""


def train(settings: Settings, quiet: bool = False) -> Run:
    """
    Trains from the start or from the newest checkpoint of `run_dir`, and writes `model/` at the end.

    Raises:
        SettingsError: for data or settings that cannot be used; nothing is written then.
        TrainingFailed: where the loss is not finite; the last checkpoint is as it was.
    """
    run = Run(settings.run_dir)
    device = _device(settings.training.device)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    torch.manual_seed(settings.training.seed)
    model = build_model(settings, tokenizer).to(device)
    state = TrainState(model, build_optimizers(model, settings.training))
    training_data, validation = _load_data(settings, tokenizer)
    if settings.training.resume == "auto" and (saved := list_checkpoints(run.checkpoints)):
        load_checkpoint(saved[-1], state)
    elif run.metrics_file.exists() and settings.training.resume == "auto":
        run.metrics_file.unlink()  # of a run that was stopped before its first checkpoint
    elif list_checkpoints(run.checkpoints):
        raise SettingsError(f"{run.path} holds another run's checkpoints: take another run_dir, or resume=auto")

    run.path.mkdir(parents=True, exist_ok=True)
    resolved = settings.model_copy(deep=True)
    if isinstance(model, FreeTransformer):
        resolved.model = settings.model.model_copy(update={"plan_gradient": model.config.plan_gradient})
        resolved.training.table_optimizer = table_optimizer(model, settings.training)
    run.write_config(resolved)
    run.forget_metrics_after(state.step)
    with Display(run, settings, quiet) as display:
        display.start(model, state.step, training_data)
        _Trainer(settings, run, state, tokenizer, device, display).run_to_the_end(training_data, validation)
    return run


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that the settings describe, free or baseline, for this tokenizer."""
    config = settings.model.build(
        vocab_size=len(tokenizer),
        kl_weight=settings.training.kl_weight,
        bos_token_id=begin_token(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({} if _names_length(settings) else {"max_seq_len": settings.training.seq_len}),
    )
    if config.max_position_embeddings < settings.training.seq_len:
        raise SettingsError(
            f"training.seq_len={settings.training.seq_len} is longer than model.max_seq_len="
            f"{config.max_position_embeddings}"
        )
    model = build_baseline(config) if settings.model.kind == "baseline" else FreeTransformer(config)
    if settings.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _names_length(settings: Settings) -> bool:
    return bool({"max_seq_len", "max_position_embeddings"} & (settings.model.model_extra or {}).keys())


def _load_data(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Rows | None]:
    data, training = settings.data, settings.training
    try:
        documents = _Documents(data.train, data.column)
        train_rows: Any = documents if data.streaming else build_rows(documents, tokenizer, training.seq_len)
        validation = None
        if data.validation:
            validation = build_rows(read_documents(data.validation, data.column), tokenizer, training.seq_len)
            validation = validation.sample(training.eval_rows)
        if isinstance(train_rows, Rows):
            next(train_rows.shuffled(training.batch_size, training.seed))
        else:
            next(iter(documents))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return train_rows, validation


@dataclass
class _Documents:
    """Documents that can be read again and again, one pass an epoch."""

    sources: list[str]
    column: str

    def __iter__(self) -> Iterator[str]:
        return read_documents(self.sources, self.column)


@dataclass
class _Totals:
    """Sums since the last line of metrics; tensors, so that a GPU need not be waited for at every step."""

    reconstruction: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)


@dataclass
class _Trainer:
    settings: Settings
    run: Run
    state: TrainState
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    display: Display
    last_batches: list[Batch] = field(default_factory=list)

    def run_to_the_end(self, training_data: Any, validation: Rows | None) -> None:
        training, state = self.settings.training, self.state
        model: Any = torch.compile(state.model) if training.compile else state.model
        batches = self._batches(training_data, state.step * training.gradient_accumulation_steps)
        totals = _Totals()
        while state.step < training.max_steps:
            rate = set_learning_rate(state.optimizers, state.step, training)
            self._optimizer_step(model, batches, totals)
            state.step += 1
            last = state.step == training.max_steps
            saving = _due(state.step, training.save_every, last)
            if saving or state.step % training.log_every == 0:  # a state that is saved has a finite loss
                self._log(totals, rate)
                totals = _Totals()
            if _due(state.step, training.eval_every, last):
                self._validate(validation)
            if _due(state.step, self.settings.logging.sample_every, last):
                self._sample()
            if saving:
                save_checkpoint(self.run.checkpoints, state, training.keep_checkpoints)
        self._gather_prior(training_data)
        with new_folder(self.run.model_folder) as folder:
            state.model.save_pretrained(folder)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)

    def _batches(self, training_data: Any, start: int) -> Iterator[Batch]:
        training, data = self.settings.training, self.settings.data
        if isinstance(training_data, Rows):
            return training_data.shuffled(training.batch_size, training.seed, start)
        return streamed_batches(
            *(training_data, self.tokenizer, training.seq_len, training.batch_size),
            *(data.shuffle_buffer, training.seed, start),
        )

    def _optimizer_step(self, model: Any, batches: Iterator[Batch], totals: _Totals) -> None:
        """One step over all micro-batches; each loss is divided by the predicted tokens of them all."""
        training, state = self.settings.training, self.state
        micro = [next(batches) for _ in range(training.gradient_accumulation_steps)]
        tokens = sum(int(predicted_tokens(batch["labels"])) for batch in micro)
        weights = self._scheduled_weights()
        for batch in micro:
            batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
            with self._autocast():
                output = training_forward(model, batch, tokens, weights)
            output["loss"].backward()
            totals.loss.append(output["loss"].detach())
            totals.reconstruction.append(output["reconstruction"].detach())
            if output["kl"] is not None:
                totals.kl.append(output["kl"].detach())
        if training.grad_clip > 0:
            clip_gradients(state.model.parameters(), training.grad_clip)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        totals.tokens += tokens
        self.last_batches = micro

    def _scheduled_weights(self) -> dict[str, Tensor]:
        """As tensors, so that a compiled model is not compiled again for each value."""
        if self.settings.model.kind == "baseline":
            return {}
        weights = scheduled_weights(self.settings.training, self.settings.model.free_bits, self.state.step)
        return {name: torch.tensor(value, device=self.device) for name, value in weights.items()}

    def _autocast(self) -> Any:
        wanted = self.settings.training.precision
        if wanted == "bf16" or (wanted == "auto" and _has_bf16(self.device)):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _log(self, totals: _Totals, rate: float) -> None:
        steps = len(totals.loss) / self.settings.training.gradient_accumulation_steps
        loss = float(torch.stack(totals.loss).sum()) / steps
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss} at step {self.state.step}: lower training.learning_rate, lengthen "
                f"training.warmup_steps or use precision=fp32; {self.run.checkpoints} holds the last good state"
            )
        values = {
            "loss": loss,
            "reconstruction": float(torch.stack(totals.reconstruction).sum()) / steps,
            "kl": float(torch.stack(totals.kl).mean()) if totals.kl else None,
            "lr": rate,
            "tokens_per_second": totals.tokens / (time.perf_counter() - totals.started),
        }
        self.display.log(self.state.step, "train", values)

    def _validate(self, rows: Rows | None) -> None:
        """On held-out rows; without any, on the step's own batch, for the watcher alone."""
        training, step = self.settings.training, self.state.step
        if rows is None and not isinstance(self.state.model, FreeTransformer):
            return
        with _own_randomness(training.seed), self._autocast():
            batches = self.last_batches if rows is None else rows.in_order(training.batch_size)
            result = evaluate_likelihood(self.state.model, batches, VALIDATION_SAMPLES)  # type: ignore[arg-type]
        if rows is not None:
            names = ("nll", "reconstruction", "kl", "elbo", "prior", "gap")
            values = {name: getattr(result, name) for name in names if getattr(result, name) is not None}
            self.display.log(step, "validation", {"loss": values.get("elbo", result.nll), **values})
        if step > max(training.warmup_steps, WATCHED_FROM * training.max_steps) and result.gap is not None:
            free_bits = scheduled_weights(training, self.settings.model.free_bits, step - 1)["free_bits"]
            self.display.watch(step, collapse_warning(result, free_bits))

    def _gather_prior(self, training_data: Any) -> None:
        """The aggregate prior, from rows of training text in an order of its own."""
        training, model = self.settings.training, self.state.model
        if not isinstance(model, FreeTransformer) or training.prior_rows == 0:
            return
        batches = itertools.islice(self._batches(training_data, 0), -(-training.prior_rows // training.batch_size))
        model.eval()
        with _own_randomness(training.seed), self._autocast():
            model.gather_prior(batches)
        model.train()

    def _sample(self) -> None:
        prompt = torch.tensor([[begin_token(self.tokenizer)]], device=self.device)
        model: Any = self.state.model
        model.eval()
        with _own_randomness(self.settings.training.seed + self.state.step), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.settings.logging.sample_tokens,
                do_sample=True,
            )
        model.train()
        self.display.sample(self.state.step, self.tokenizer.decode(tokens[0], skip_special_tokens=True))


def training_forward(
    model: Any, batch: Batch, num_tokens: int, weights: Mapping[str, float | Tensor] | None = None
) -> dict[str, Any]:
    """
    Loss, reconstruction and KL of a batch, divided by `num_tokens`, for either kind of model.

    Args:
        weights: `kl_weight` and `free_bits` of this step, default the model's.
    """
    plain = getattr(model, "_orig_mod", model)
    if isinstance(plain, FreeTransformer):
        output = model(**batch, mode="training", num_items_in_batch=num_tokens, **(weights or {}))
        return {"loss": output.loss, "reconstruction": output.reconstruction, "kl": output.kl}
    output = model(**baseline_inputs(batch), num_items_in_batch=num_tokens)
    return {"loss": output.loss, "reconstruction": output.loss, "kl": None}


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Validation and samples must not move the random numbers of training: a resumed run would differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"training.device={name!r}: not on this machine (auto, cpu, cuda, mps)") from error
