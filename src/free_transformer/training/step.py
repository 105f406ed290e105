"""One optimizer step: forward, backward, clipping, and update, in the precision of the settings."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from free_transformer.distributed.parallelize import PlanPlace, SharedBinaryMapper, plan_places, synchronize_gradients
from free_transformer.distributed.processes import Processes
from free_transformer.evaluation.likelihood import baseline_inputs
from free_transformer.model.layout import PlanLayout, batch_layout, num_plans, to_device
from free_transformer.model.losses import LossWeights, predicted_tokens
from free_transformer.model.modeling import FreeTransformer
from free_transformer.settings import SettingsError, TrainingSettings
from free_transformer.training.checkpoint import TrainState
from free_transformer.training.metrics import MetricAccumulator
from free_transformer.training.optimizers import clip_gradients

# Arguments of a model's `forward`: tensors of a batch, possibly with a layout instead of some of them.
ModelInputs = Mapping[str, Any]


def training_forward(
    model: PreTrainedModel, batch: ModelInputs, num_tokens: int, weights: Mapping[str, float | Tensor] | None = None
) -> dict[str, Any]:
    """
    Computes loss and reconstruction of a batch, divided by `num_tokens`, for either kind of model.

    A Free Transformer also returns `kl`, `hinge` and `kl_per_bit`, summed over all plans, in bits, and the number of
    `plans`.

    Args:
        weights: `kl_weight` and `free_bits` of this step, default the model's.
    """
    if isinstance(model, FreeTransformer):
        loss_weights = LossWeights.of(model.config, **(weights or {}))
        options = {"num_items_in_batch": num_tokens, "loss_weights": loss_weights, "skip_logits": True}
        output = model(**batch, mode="training", **options)
        plans = output.plan_mask.sum()
        of_plans = {name: output[name] * plans for name in ("kl", "hinge", "kl_per_bit")}
        return {"loss": output.loss, "reconstruction": output.reconstruction, "plans": plans, **of_plans}
    output = model(**baseline_inputs(batch), num_items_in_batch=num_tokens)
    return {"loss": output.loss, "reconstruction": output.loss}


def with_layout(model: PreTrainedModel, batch: ModelInputs) -> dict[str, Any]:
    """
    Replaces `attention_mask` and `position_ids` of a batch on the CPU by the layout.

    A Free Transformer then does not wait for the GPU. A batch for another model is returned unchanged.
    """
    inputs = dict(batch)
    if isinstance(model, FreeTransformer) and inputs.keys() & {"attention_mask", "position_ids"}:
        described = (inputs.pop("attention_mask", None), inputs.pop("position_ids", None))
        inputs["layout"] = batch_layout(model.config.plan_span, tuple(inputs["input_ids"].shape), *described)
    return inputs


@dataclass
class SharedStep:
    """Values that the processes of a run exchange before a step, in one collective."""

    tokens: int  # number of tokens predicted in the step
    signal: int  # signal that requested a process to stop, or 0
    places: list[PlanPlace]  # one per micro-batch


def agree_on_step(
    processes: Processes, model: PreTrainedModel, micro: Sequence[ModelInputs], signal: int
) -> SharedStep:
    """
    Exchanges the values of a step between all processes.

    Args:
        micro: this process's micro-batches, from `with_layout`.
        signal: signal that requested this process to stop, or 0.
    """
    tokens = sum(int(predicted_tokens(batch["labels"])) for batch in micro)
    shapes = []
    for batch in micro:
        rows, length = batch["input_ids"].shape
        span = getattr(model.config, "plan_span", "sequence")
        plans = batch["layout"].num_plans if "layout" in batch else num_plans(span, length)
        shapes += [rows, plans]
    found = processes.exchange(signal, tokens, *shapes)
    of_data = found[:: processes.tensor]  # processes of a tensor-parallel group read the same rows
    places = plan_places([each[2:] for each in of_data], processes)
    return SharedStep(sum(each[1] for each in of_data), max(each[0] for each in found), places)


def compute_gradients(
    state: TrainState,
    micro: Sequence[ModelInputs],
    num_tokens: int,
    weights: Mapping[str, float | Tensor],
    training: TrainingSettings,
    processes: Processes,
    check: Callable[[], None] = lambda: None,
    places: Sequence[PlanPlace] | None = None,
) -> MetricAccumulator:
    """
    Runs forward and backward of the micro-batches of a step, and clips the summed gradients.

    It does not synchronize with the GPU, except with fp16, which checks for infinite gradients.

    Args:
        micro: batches on the CPU.
        check: called before each micro-batch; it may raise an error to end the step.
        places: one per micro-batch, from `agree_on_step`. If None, several processes exchange them when needed.
    """
    of_step = MetricAccumulator(tokens=num_tokens)
    for index, batch in enumerate(micro):
        check()
        synchronize_gradients(state.model, index == len(micro) - 1)
        if isinstance(mapper := getattr(state.model, "plan_mapper", None), SharedBinaryMapper):
            mapper.place = None if places is None else places[index]
        batch = _on_device(with_layout(state.model, batch), processes.device)
        with autocast(training.precision, processes):
            losses = training_forward(state.model, batch, num_tokens, weights)
        state.scaler.scale(losses["loss"] * processes.data_size).backward()  # sharded gradients are averaged
        of_step.add(losses)
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    of_step.gradient_norm.append(clip_gradients(state.model.parameters(), training.grad_clip))
    return of_step


def _on_device(inputs: ModelInputs, device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, PlanLayout) else to_device(value, device)
        for name, value in inputs.items()
    }


def apply_gradients(state: TrainState) -> None:
    for optimizer in state.optimizers:
        state.scaler.step(optimizer)
    state.scaler.update()


def computing_dtype(precision: str, processes: Processes) -> torch.dtype | None:
    """
    Returns the dtype of matrix products, None for that of the weights.

    Raises:
        SettingsError: for fp16 if its losses cannot be scaled.
    """
    device = processes.device
    if precision == "fp16":
        if device.type != "cuda":
            raise SettingsError(
                f"training.precision=fp16 on {device.type}: fp16 is supported only on GPUs; use bf16 or fp32"
            )
        if processes.size > 1:
            raise SettingsError("training.precision=fp16: loss scaling needs a single process; use bf16 or fp32")
        return torch.float16
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and _has_bf16(device)) else None


def autocast(precision: str, processes: Processes) -> AbstractContextManager:
    dtype = computing_dtype(precision, processes)
    if dtype is None or processes.data_size > 1:
        return contextlib.nullcontext()  # or `fully_shard` has cast the weights
    return torch.autocast(processes.device.type, dtype=dtype)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
