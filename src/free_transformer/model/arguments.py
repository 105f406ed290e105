"""Checks of the arguments of `FreeTransformer.forward`, and the defaults that depend on several of them."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import PlanCache, PlanState
from .compat import Cache
from .errors import InputError
from .layout import PlanLayout
from .sampling import PROMPT_PLANS, check_choice

if TYPE_CHECKING:
    from .modeling import FreeTransformer

MODES = ("training", "inference")
NO_ENCODER_GRADIENT = (
    "called in training mode without labels: the plan is sampled from the prior and the encoder gets no gradient. "
    "Pass labels or mode='training', or mode='inference' if intended. (Trainers on preferences or rewards, such "
    "as DPO and GRPO of TRL, are not supported)"
)


def check_loss_arguments(labels: Tensor | None, num_items: int | Tensor | None, skip_logits: bool) -> None:
    if labels is not None:
        return
    if skip_logits:
        raise InputError("skip_logits=True needs labels: without them there is no loss to return")
    if num_items is not None:
        raise InputError(
            "num_items_in_batch without labels: label_smoothing_factor and compute_loss_func of a Trainer withhold the "
            "labels from the model, so its encoder would not be trained. Remove these options; the model computes "
            "the loss itself"
        )


def resolve_mode(mode: str | None, plan: object, labels: Tensor | None, prompt_plan: str | None) -> str:
    if mode is None:
        mode = "training" if labels is not None and plan is None else "inference"
    if mode not in MODES:
        raise InputError(f"mode={mode!r}: one of {MODES}")
    if mode == "training" and plan is not None:
        raise InputError(
            "mode='training' samples the plan from the posterior: pass a plan with mode='inference' instead"
        )
    if prompt_plan is not None:
        check_choice("prompt_plan", prompt_plan, PROMPT_PLANS)
    return mode


def resolve_cache(
    model: "FreeTransformer", given: Cache | None, use_cache: bool | None, labels: Tensor | None, mode: str
) -> Cache | None:
    if model.training and torch.is_grad_enabled() and model.model.layers[0].gradient_checkpointing:
        if given is not None and int(given.get_seq_length()) > 0:
            raise InputError("cache: gradient checkpointing runs layers twice, so the cache must be empty")
        return None
    if given is not None:
        return given
    if use_cache is None:
        use_cache = model.config.use_cache and labels is None and mode == "inference"
    return PlanCache(model.config) if use_cache else None


def warn_of_lost_gradient(model: "FreeTransformer", labels: Tensor | None, mode: str | None, plan: object) -> None:
    trains = model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if trains and mode is None and plan is None and labels is None:
        warnings.warn(NO_ENCODER_GRADIENT, stacklevel=3)


def check_layout(
    layout: PlanLayout,
    shape: tuple[int, int],
    past: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> None:
    if past or attention_mask is not None or position_ids is not None:
        raise InputError(
            "layout replaces attention_mask and position_ids and needs an empty cache: do not combine them"
        )
    if layout.token_plan.shape != shape:
        raise InputError(f"layout of {tuple(layout.token_plan.shape)} tokens for a batch of {shape}")


def continues(state: PlanState, position_ids: Tensor | None) -> bool:
    """Whether this call continues texts whose plans are all known (`decode_step`)."""
    return state.columns is not None and state.plan is not None and position_ids is not None
