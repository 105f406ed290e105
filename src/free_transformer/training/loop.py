"""The training loop: settings in, a run's folder out."""

import contextlib
import itertools
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import Rows, begin_token, load_tokenizer
from free_transformer.data.rows import Batch
from free_transformer.evaluation.likelihood import baseline_inputs, evaluate_likelihood
from free_transformer.evaluation.usage import collapse_warning
from free_transformer.files import new_folder
from free_transformer.losses import predicted_tokens
from free_transformer.model import FreeTransformer, build_baseline
from free_transformer.training.batches import load_data, training_batches
from free_transformer.training.checkpoint import Checkpoints, TrainState, list_checkpoints
from free_transformer.training.display import Display
from free_transformer.training.optimizers import build_optimizers, clip_gradients, set_learning_rate, table_optimizer
from free_transformer.training.parallel import parallelize, reshard, synchronize_gradients, whole_state_dict
from free_transformer.training.processes import Processes, join_processes
from free_transformer.training.run import Run
from free_transformer.training.schedules import scheduled_weights
from free_transformer.training.settings import Settings, SettingsError
from free_transformer.training.stopping import StopRequest, TrainingStopped, listen_for_stop

VALIDATION_SAMPLES = 4
LOSSES = ("loss", "reconstruction", "kl", "plans")  # what `training_forward` returns
WATCHED_FROM = 0.1  # of the steps: a plan is seldom used sooner


class TrainingFailed(RuntimeError):
    """A run that cannot go on, such as one whose loss is no number any more."""


def train(settings: Settings, quiet: bool = False) -> Run:
    """
    Trains from the start or from the newest checkpoint of `run_dir`, and writes `model/` at the end.

    Under `torchrun` the processes share the work as `settings.distributed` says; `run_dir` must then be a folder that
    all of them see.

    Raises:
        SettingsError: for data or settings that cannot be used; nothing is written then.
        TrainingFailed: where the loss is not finite; the last checkpoint is as it was.
        TrainingStopped: after Ctrl-C or SIGTERM, when the state is saved.
        CheckpointFailed: where a checkpoint cannot be written, such as on a full disk.
        ProcessLost: where another process has ended or does not answer.
    """
    with join_processes(settings.distributed, settings.training.device) as processes:
        return _train(settings, processes, quiet)


def _train(settings: Settings, processes: Processes, quiet: bool) -> Run:
    run, training = Run(settings.run_dir), settings.training
    if training.batch_size < processes.data_size:
        raise SettingsError(
            f"training.batch_size={training.batch_size}: at least a row for each of the {processes.data_size} "
            "processes that share a batch"
        )
    tokenizer = load_tokenizer(settings.data.tokenizer)
    state = _new_state(settings, tokenizer, processes)
    training_data, validation = load_data(settings, tokenizer, processes)
    if training.resume == "never" and list_checkpoints(run.checkpoints):
        raise SettingsError(f"{run.path} holds another run's checkpoints: take another run_dir, or resume=auto")
    checkpoints = Checkpoints(run.checkpoints, training.keep_checkpoints, processes, training.async_save)
    passed_over: list[str] = []
    resumed = training.resume == "auto" and checkpoints.load_newest(state, passed_over.append)
    if processes.main:
        if not resumed and training.resume == "auto":  # of a run that was stopped before its first checkpoint
            run.metrics_file.unlink(missing_ok=True)
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(_resolved(settings, state.model, alone=processes.size == 1))
        run.forget_metrics_after(state.step)
    with Display(run, settings, processes, quiet) as display:
        display.start(state.model, state.step, training_data)
        for reason in passed_over:
            display.warn(reason)
        trainer = _Trainer(settings, run, state, tokenizer, processes, display, checkpoints)
        with listen_for_stop() as trainer.stop:
            trainer.run_to_the_end(training_data, validation)
    return run


def _new_state(settings: Settings, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> TrainState:
    """Model, spread over the processes, and optimizers at step 0; torch's random numbers are left seeded."""
    training, alone = settings.training, processes.size == 1
    torch.manual_seed(training.seed)
    model = build_model(settings, tokenizer)
    dtype = torch.bfloat16 if _is_bf16(training.precision, processes.device) else None
    parallelize(model, processes, training.gradient_checkpointing, training.compile, dtype)
    model.to(processes.device)  # type: ignore[arg-type]
    if not alone:  # dropout: another one in each process
        torch.manual_seed(int(np.random.SeedSequence([training.seed, processes.rank]).generate_state(1)[0]))
    return TrainState(model, build_optimizers(model, training, sparse_tables=alone))


def _resolved(settings: Settings, model: Any, alone: bool) -> Settings:
    """The settings with what was left to the library as it was decided."""
    resolved = settings.model_copy(deep=True)
    if isinstance(model, FreeTransformer):
        resolved.model = settings.model.model_copy(update={"plan_gradient": model.config.plan_gradient})
        resolved.training.table_optimizer = table_optimizer(model, settings.training, sparse_tables=alone)
    return resolved


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
    return build_baseline(config) if settings.model.kind == "baseline" else FreeTransformer(config)


def _names_length(settings: Settings) -> bool:
    return bool({"max_seq_len", "max_position_embeddings"} & (settings.model.model_extra or {}).keys())


@dataclass
class _Totals:
    """Since the last line of metrics, an entry a micro-batch; tensors, so that a GPU need not be waited for."""

    loss: list[Tensor] = field(default_factory=list)
    reconstruction: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)  # of all this process' plans together
    plans: list[Tensor] = field(default_factory=list)
    gradient_norm: list[Tensor] = field(default_factory=list)  # an entry a step
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            getattr(self, name).append(value.detach())

    def extend(self, others: "_Totals") -> None:
        for name in (*LOSSES, "gradient_norm"):
            getattr(self, name).extend(getattr(others, name))
        self.tokens += others.tokens

    def over(self, processes: Processes) -> dict[str, Tensor]:
        """Entries by name, of all processes together."""
        names = [name for name in LOSSES if getattr(self, name)]
        entries = processes.sum(torch.stack([torch.stack(getattr(self, name)).float() for name in names]))
        return {**dict(zip(names, entries, strict=True)), "gradient_norm": torch.stack(self.gradient_norm)}


@dataclass
class _Trainer:
    settings: Settings
    run: Run
    state: TrainState
    tokenizer: PreTrainedTokenizerBase
    processes: Processes
    display: Display
    checkpoints: Checkpoints
    stop: StopRequest = field(default_factory=StopRequest)
    last_batches: list[Batch] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def run_to_the_end(self, training_data: Any, validation: Rows | None) -> None:
        training, state = self.settings.training, self.state
        batches = training_batches(training_data, self.tokenizer, self.settings, self.processes, state.batches)
        totals = _Totals()
        while state.step < training.max_steps:
            rate = set_learning_rate(state.optimizers, state.step, training)
            stop = self._optimizer_step(batches, totals)
            state.step += 1
            last = state.step == training.max_steps
            saving = _due(state.step, training.save_every, last) or stop > 0
            if totals.gradient_norm and (saving or state.step % training.log_every == 0):
                self._log(totals, rate, training_data)  # a state that is saved has finite losses and gradients
                totals = _Totals()
            if _due(state.step, training.eval_every, last):
                self._validate(validation)
            if _due(state.step, self.settings.logging.sample_every, last):
                self._sample()
            if saving:
                self.checkpoints.save(state)
            if stop and not last:
                self.checkpoints.wait()
                self.display.stopped(state.step, signal.Signals(stop).name)
                raise TrainingStopped(stop)
        self.checkpoints.wait()
        self._gather_prior(training_data)
        self._write_model()

    def _optimizer_step(self, batches: Iterator[Batch], totals: _Totals) -> int:
        """
        One step over all micro-batches; each loss is divided by the predicted tokens of them all.

        Returns:
            the signal that has asked some process to stop, or 0.
        """
        training, state, processes = self.settings.training, self.state, self.processes
        micro = [next(batches) for _ in range(training.gradient_accumulation_steps)]
        tokens = int(processes.sum(torch.stack([predicted_tokens(batch["labels"]) for batch in micro]).sum()))
        weights = self._scheduled_weights()
        of_step = _Totals(tokens=tokens)
        for index, batch in enumerate(micro):
            synchronize_gradients(state.model, index == len(micro) - 1)
            batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
            with self._autocast():
                losses = training_forward(state.model, batch, tokens, weights)
            (losses["loss"] * processes.data_size).backward()  # sharded gradients are averaged
            of_step.add(losses)
        of_step.gradient_norm.append(clip_gradients(state.model.parameters(), training.grad_clip))
        if training.nonfinite == "stop" or self._all_finite(of_step):
            for optimizer in state.optimizers:
                optimizer.step()
            totals.extend(of_step)
        else:
            self._skip()
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        self.last_batches = micro
        state.batches += len(micro)
        return processes.largest(self.stop.signal)[0]

    def _all_finite(self, of_step: _Totals) -> bool:
        finite = torch.stack([*of_step.gradient_norm, *of_step.loss]).isfinite().all()
        return self.processes.largest(not finite) == [0]

    def _skip(self) -> None:
        """A step is left out, and written down; too many end the run."""
        training, state = self.settings.training, self.state
        state.skipped += 1
        if state.skipped > training.max_skipped:
            raise TrainingFailed(
                f"step {state.step + 1} is the {state.skipped}th whose loss or gradient is no number, over "
                f"training.max_skipped={training.max_skipped}: {self._advice()}"
            )
        self.display.skip(state.step + 1)

    def _scheduled_weights(self) -> dict[str, Tensor]:
        """As tensors, so that a compiled model is not compiled again for each value."""
        if self.settings.model.kind == "baseline":
            return {}
        weights = scheduled_weights(self.settings.training, self.settings.model.free_bits, self.state.step)
        return {name: torch.tensor(value, device=self.device) for name, value in weights.items()}

    def _autocast(self) -> Any:
        if self.processes.data_size == 1 and _is_bf16(self.settings.training.precision, self.device):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()  # or `fully_shard` has cast the weights

    def _log(self, totals: _Totals, rate: float, training_data: Any) -> None:
        entries = totals.over(self.processes)
        steps = len(totals.gradient_norm)
        self._check_finite(entries, steps, training_data)
        values = {
            "loss": float(entries["loss"].sum()) / steps,
            "reconstruction": float(entries["reconstruction"].sum()) / steps,
            "kl": float((entries["kl"] / entries["plans"]).mean()) if "kl" in entries else None,
            "lr": rate,
            "tokens_per_second": totals.tokens / (time.perf_counter() - totals.started),
        }
        self.display.log(self.state.step, "train", values)

    def _check_finite(self, entries: dict[str, Tensor], steps: int, training_data: Any) -> None:
        """`TrainingFailed` with the first step that was no number, and where its text stands in the data."""
        accumulated = self.settings.training.gradient_accumulation_steps
        losses = entries["loss"].view(steps, accumulated)
        for offset, (of_step, norm) in enumerate(zip(losses, entries["gradient_norm"], strict=True)):
            what, value = ("loss", of_step.sum()) if not of_step.isfinite().all() else ("gradient's norm", norm)
            if value.isfinite():
                continue
            step = self.state.step - steps + offset + 1
            micro = self.state.batches - (steps - offset) * accumulated + int((~of_step.isfinite()).int().argmax())
            where = f"micro-batch {micro}"
            if isinstance(training_data, Rows):
                epoch, index = divmod(micro, len(training_data) // self.settings.training.batch_size)
                where = f"batch {index} of epoch {epoch}"
            raise TrainingFailed(f"the {what} is {float(value)} at step {step} ({where} of the data): {self._advice()}")

    def _advice(self) -> str:
        saved = list_checkpoints(self.run.checkpoints)
        last = f"the last good state is {saved[-1]}" if saved else "no checkpoint was written yet"
        return (
            "lower training.learning_rate, lengthen training.warmup_steps, use precision=fp32 or leave such steps out "
            f"with training.nonfinite=skip; {last}"
        )

    def _validate(self, rows: Rows | None) -> None:
        """On held-out rows; without any, on the step's own batch, for the watcher alone."""
        training, step = self.settings.training, self.state.step
        if rows is None and not isinstance(self.state.model, FreeTransformer):
            return
        shared = rows is not None and self.processes.data_size > 1
        with self._beside_training(training.seed), self._autocast():
            batches = self.last_batches if rows is None else rows.in_order(training.batch_size)
            group = self.processes.data_group if shared else None
            result = evaluate_likelihood(self.state.model, batches, VALIDATION_SAMPLES, group=group)  # type: ignore[arg-type]
        if rows is not None:
            names = ("nll", "reconstruction", "kl", "elbo", "prior", "gap")
            values = {name: getattr(result, name) for name in names if getattr(result, name) is not None}
            self.display.log(step, "validation", {"loss": values.get("elbo", result.nll), **values})
        if step > max(training.warmup_steps, WATCHED_FROM * training.max_steps) and result.gap is not None:
            free_bits = scheduled_weights(training, self.settings.model.free_bits, step - 1)["free_bits"]
            self.display.watch(step, collapse_warning(result, free_bits))

    def _gather_prior(self, training_data: Any) -> None:
        """The aggregate prior, from rows of training text in an order of its own, in every process the same."""
        training, model = self.settings.training, self.state.model
        if not isinstance(model, FreeTransformer) or training.prior_rows == 0:
            return
        count = -(-training.prior_rows // training.batch_size)
        alone = Processes(self.device)  # so that all read the same
        batches = itertools.islice(training_batches(training_data, self.tokenizer, self.settings, alone), count)
        with self._beside_training(training.seed), self._autocast():
            model.gather_prior(batches)

    def _sample(self) -> None:
        """A text, written by all processes together."""
        prompt = torch.tensor([[begin_token(self.tokenizer)]], device=self.device)
        model: Any = self.state.model
        with self._beside_training(self.settings.training.seed + self.state.step), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.settings.logging.sample_tokens,
                do_sample=True,
            )
        self.display.sample(self.state.step, self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    @contextlib.contextmanager
    def _beside_training(self, seed: int) -> Iterator[None]:
        """
        The model in eval mode. Validation and samples must not move the random numbers of training, or a resumed run
        would differ; nor are their shapes worth a compilation of their own; what they gather is given up.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        self.state.model.eval()
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            yield
        self.state.model.train()
        reshard(self.state.model)

    def _write_model(self) -> None:
        model: Any = self.state.model
        weights = {} if self.processes.size == 1 else {"state_dict": whole_state_dict(model)}
        if self.processes.main:
            with new_folder(self.run.model_folder) as folder:
                model.save_pretrained(folder, **weights)
                self.tokenizer.save_pretrained(folder)
        self.processes.barrier()


def training_forward(
    model: Any, batch: Batch, num_tokens: int, weights: Mapping[str, float | Tensor] | None = None
) -> dict[str, Any]:
    """
    Loss and reconstruction of a batch, divided by `num_tokens`, for either kind of model; of a free one also the KL
    of all its plans together, in bits, and their number.

    Args:
        weights: `kl_weight` and `free_bits` of this step, default the model's.
    """
    if isinstance(model, FreeTransformer):
        output = model(**batch, mode="training", num_items_in_batch=num_tokens, **(weights or {}))
        plans = output.plan_mask.sum()
        return {"loss": output.loss, "reconstruction": output.reconstruction, "kl": output.kl * plans, "plans": plans}
    output = model(**baseline_inputs(batch), num_items_in_batch=num_tokens)
    return {"loss": output.loss, "reconstruction": output.loss}


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _is_bf16(wanted: str, device: torch.device) -> bool:
    return wanted == "bf16" or (wanted == "auto" and _has_bf16(device))


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
