"""Output of the model, and output of its lower layers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cache import PlanState
from .compat import CACHE_NAME, BothCacheNames, Cache, CausalLMOutputWithPast
from .layout import PlanLayout


@dataclass
class FreeTransformerOutput(BothCacheNames, CausalLMOutputWithPast):
    """
    Output of `FreeTransformer.forward`: the fields of `CausalLMOutputWithPast`, the plan and its losses.

    Losses are in nats per predicted token, `kl` and `hinge` in bits per plan. The cache can be read as `cache` and as
    `past_key_values`.
    """

    plan: Tensor | None = None  # (B, P, H) bool, the plan used
    plan_logits: Tensor | None = None  # (B, P, H) of the posterior; None in inference mode
    plan_mask: Tensor | None = None  # (B, P) bool, False for a plan that covers only padding
    reconstruction: Tensor | None = None
    kl: Tensor | None = None
    hinge: Tensor | None = None  # KL beyond the free bits
    kl_per_bit: Tensor | None = None  # (H,), mean over plans


@dataclass
class LowerOutput:
    """Output of the lower layers and what the upper layers need."""

    hidden_states: Tensor  # X, (B, T, D)
    layout: PlanLayout | None  # None if a cache holds the beginning of the text
    token_plan: Tensor  # (B, T) or (1, T), the plan of each token
    num_plans: int  # of the text so far
    num_tokens: int  # of the text so far, padding included
    layer_arguments: dict[str, Any]
    all_hidden_states: list[Tensor] | None = None  # the input of each layer, if requested

    @property
    def last_row_suffices(self) -> bool:
        """Whether the last row of the attention mask suffices to compute the last token alone."""
        if self.layer_arguments.keys() & {"boundaries", "cu_seq_lens_q", "attentions"}:
            return False  # documents are separated without a mask, or the attention of all tokens is requested
        blocks = self.layer_arguments.get("blocks")
        if blocks is not None and not blocks.equal:
            return False
        mask, cache = self.layer_arguments["attention_mask"], self.layer_arguments["cache"]
        if mask is None:  # causal, which also hides the unused columns of a static cache
            return cache is None or not cache.is_compileable
        return isinstance(mask, Tensor) and mask.dim() == 4


def model_output(
    lower: LowerOutput,
    state: PlanState,
    cache: Cache | None,
    logits: Tensor | None,
    plan_logits: Tensor | None = None,
    losses: dict[str, Tensor | None] | None = None,
) -> FreeTransformerOutput:
    """Builds the output of a forward pass."""
    attentions = lower.layer_arguments.get("attentions")
    return FreeTransformerOutput(
        **(losses or {}),
        logits=logits,
        hidden_states=None if lower.all_hidden_states is None else tuple(lower.all_hidden_states),
        attentions=None if attentions is None else tuple(attentions),
        plan=_used_plan(state, lower),
        plan_logits=plan_logits,
        plan_mask=None if lower.layout is None else lower.layout.plan_mask,
        **{CACHE_NAME: cache},
    )


def _used_plan(state: PlanState, lower: LowerOutput) -> Tensor | None:
    """Returns the plans of the text so far, or all known plans if the beginning of the text was dropped."""
    if state.plan is None or state.dropped_plans is not None:
        return state.plan
    return state.plan[:, : lower.num_plans]
