"""Operations on plans: set and flip bits, interpolate between plans, average posteriors, read the plan of a text."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data import begin_token, encode
from free_transformer.errors import InputError
from free_transformer.model.context import example_windows
from free_transformer.model.modeling import FreeTransformer


def set_bits(plan: Tensor, values: Mapping[int, bool | int]) -> Tensor:
    """
    Returns a copy with these bits set to the given values in each of the P plans, (..., P, H) bool.

    Raises:
        InputError: for a bit index out of range, or a value other than 0 and 1.
    """
    result = plan.clone()
    for bit, value in values.items():
        if value not in (0, 1):
            raise InputError(f"bit {bit}: value {value!r} is neither 0 nor 1")
        result[..., _checked(plan, bit)] = bool(value)
    return result


def flip_bit(plan: Tensor, bit: int) -> Tensor:
    """Returns a copy with one bit flipped in all P plans, (..., P, H) bool. Raises `InputError` if out of range."""
    result = plan.clone()
    result[..., _checked(plan, bit)] ^= True
    return result


def path(start: Tensor, end: Tensor) -> Tensor:
    """
    Interpolates between two plans by flipping one bit at a time, in the order of the bits.

    Args:
        start: the first plan, (P, H) bool.
        end: the last plan, (P, H) bool.

    Returns:
        (N + 1, P, H) bool if N bits differ. `generate(plan=...)` generates one text for each.

    Raises:
        InputError: if the shapes differ.
    """
    if start.shape != end.shape:
        raise InputError(f"plans of shapes {tuple(start.shape)} and {tuple(end.shape)}: the shapes must be equal")
    steps = [start.clone()]
    for position in (start != end).flatten().nonzero()[:, 0].tolist():
        step = steps[-1].clone()
        step.view(-1)[position] ^= True
        steps.append(step)
    return torch.stack(steps)


def average_posteriors(plan_logits: Tensor) -> Tensor:
    """
    Averages the posteriors of several examples: returns the logits of each bit's mean probability.

    Args:
        plan_logits: (N, P, H), as `infer_plan` returns.

    Returns:
        (P, H) logits. `> 0` is the most likely shared plan. Logits near 0 belong to bits in which the examples differ.
    """
    tiny = torch.finfo(torch.float64).eps
    return plan_logits.double().sigmoid().mean(0).logit(tiny).to(plan_logits.dtype)


def _checked(plan: Tensor, bit: int) -> int:
    if not 0 <= bit < plan.shape[-1]:
        raise InputError(f"bit {bit}: plans of this model have bits 0 to {plan.shape[-1] - 1}")
    return bit


def plan_of_text(model: FreeTransformer, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Returns the most likely plans of a text of any length, (P, H) bool (see `example_windows`)."""
    ids = [begin_token(tokenizer), *encode(tokenizer, [text])[0]]
    windows = example_windows(ids, model.config.max_position_embeddings, model.config.plan_span)
    return average_posteriors(model.infer_plan(torch.tensor(windows, device=model.device))) > 0
