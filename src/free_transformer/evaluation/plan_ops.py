"""Plans made from plans: bits set and flipped, ways from one plan to another, the plan that examples share."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data import begin_token, encode
from free_transformer.model.modeling import FreeTransformer


def set_bits(plan: Tensor, values: Mapping[int, bool | int]) -> Tensor:
    """
    The plan with these bits fixed, in each of its P plans: (..., P, H) bool -> the same.

    Raises:
        ValueError: for a bit that the plan has not, or a value that is no bit.
    """
    result = plan.clone()
    for bit, value in values.items():
        if value not in (0, 1):
            raise ValueError(f"bit {bit}: {value!r} is neither 0 nor 1")
        result[..., _checked(plan, bit)] = bool(value)
    return result


def flip_bit(plan: Tensor, bit: int) -> Tensor:
    """The plan with one bit turned over, in each of its P plans: (..., P, H) bool -> the same."""
    result = plan.clone()
    result[..., _checked(plan, bit)] ^= True
    return result


def path(start: Tensor, end: Tensor) -> Tensor:
    """
    From one plan to another, a bit at a time, in the order of the bits.

    Args:
        start, end: (P, H) bool.

    Returns:
        (N + 1, P, H) where N bits differ; `generate(plan=path)` writes a text for each.
    """
    if start.shape != end.shape:
        raise ValueError(f"plans of {tuple(start.shape)} and {tuple(end.shape)} bits have no way between them")
    steps = [start.clone()]
    for position in (start != end).flatten().nonzero()[:, 0].tolist():
        step = steps[-1].clone()
        step.view(-1)[position] ^= True
        steps.append(step)
    return torch.stack(steps)


def average_posteriors(plan_logits: Tensor) -> Tensor:
    """
    What the posteriors of several examples have in common: logits of the mean probability of each bit.

    Args:
        plan_logits: (N, P, H), as `infer_plan` returns.

    Returns:
        (P, H); `> 0` is the plan that most of them share, and bits near 0 are those on which they differ.
    """
    tiny = torch.finfo(torch.float64).eps
    return plan_logits.double().sigmoid().mean(0).logit(tiny).to(plan_logits.dtype)


def _checked(plan: Tensor, bit: int) -> int:
    if not 0 <= bit < plan.shape[-1]:
        raise ValueError(f"bit {bit}: this plan has bits 0 to {plan.shape[-1] - 1}")
    return bit


def plan_of_text(model: FreeTransformer, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The most likely plans of a text, (P, H) bool, read from as much of it as the model was built for."""
    ids = [begin_token(tokenizer), *encode(tokenizer, [text])[0]]
    tokens = torch.tensor([ids[: model.config.max_position_embeddings]], device=model.device)
    return model.infer_plan(tokens)[0] > 0
