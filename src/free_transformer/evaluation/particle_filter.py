"""
Sequential Monte Carlo over the plans of a text: estimates the likelihood of texts with many plans.

Importance weights of whole texts degenerate if a text has many plans: a single sample dominates the sum. Here, `K`
particles are sampled from the posterior plan by plan and weighted by the tokens that each plan covers. When the
effective sample size falls below half of `K`, likely particles replace unlikely ones (systematic resampling). The
estimate of p(x) is unbiased, so the mean of its negative logarithm is an upper bound of the NLL.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from free_transformer.errors import InputError
from free_transformer.model.cache import PlanCache
from free_transformer.model.layout import PlanLayout
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.outputs import LowerOutput

RESAMPLE_BELOW = 0.5  # effective sample size, as a share of K


def particle_filter(
    model: FreeTransformer,
    lower: LowerOutput,
    plan_logits: Tensor,
    nats: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    num_particles: int,
    prior: str,
) -> Tensor:
    """
    Estimates the likelihood of texts with many plans.

    Args:
        lower: output of the lower layers for B rows of T tokens. The upper layers run once for each of the
            `num_particles` of a row.
        plan_logits: (B, P, H), logits of the posterior that plans are sampled from.
        nats: computes cross-entropies of logits (N, t, V) against tokens (N, t), 0 where nothing is predicted.
        target: (B, T), the token that follows each token.
        prior: `"uniform"` or `"aggregate"`.

    Returns:
        (B, T): estimates of log p in nats, at the last token of each row, or of each document of a packed row.
    """
    layout = lower.layout
    assert layout is not None
    batch, tokens = target.shape
    upper = _UpperLayers(model, lower, num_particles)
    log_weights = torch.zeros(batch, num_particles, dtype=torch.float64, device=target.device)
    plan = torch.zeros(batch, num_particles, plan_logits.shape[-1], dtype=torch.bool, device=target.device)
    estimates = torch.zeros(batch, tokens, dtype=torch.float64, device=target.device)
    rows = torch.arange(batch, device=target.device)
    bounds = [*_plan_starts(layout), tokens]
    for start, end in pairwise(bounds):
        index = layout.token_plan[:, start]
        new = torch.ones_like(rows, dtype=torch.bool) if start == 0 else index != layout.token_plan[:, start - 1]
        if start > 0:
            ends = _document_ends(layout, start)  # documents are independent: weights restart
            resampled = new & ~ends & (_effective_size(log_weights) < RESAMPLE_BELOW * num_particles)
            settled = ends | resampled
            estimates[settled, start - 1] += _log_mean(log_weights[settled])
            if resampled.any():
                chosen = _systematic(log_weights, resampled)
                plan = plan.gather(1, chosen[..., None].expand_as(plan))
                upper.reorder(chosen)
            log_weights[settled] = 0
        logits = plan_logits[rows, index][:, None].expand(-1, num_particles, -1)
        sampled = model.plan_mapper(logits)
        plan = torch.where(new[:, None, None], sampled, plan)
        proposal = F.logsigmoid(torch.where(sampled, logits, -logits)).sum(-1)
        counted = (new & layout.plan_mask[rows, index])[:, None]
        log_weights += (model.plan_prior.log_prob(sampled, prior) - proposal).double() * counted
        repeated = target[:, start:end].repeat_interleave(num_particles, 0)
        lost = nats(upper.step(plan.flatten(0, 1), start, end), repeated)
        log_weights -= lost.double().sum(1).view(batch, num_particles)
    estimates[:, -1] += _log_mean(log_weights)
    return estimates


class _UpperLayers:
    """Runs the upper layers, norm and head on a range of tokens at a time, for several particles per row."""

    def __init__(self, model: FreeTransformer, lower: LowerOutput, num_particles: int):
        self.model, self.lower, self.num_particles = model, lower, num_particles
        self.cache = PlanCache(model.config)
        self.mask = self._mask()

    def _mask(self) -> Tensor:
        """Attention mask, (1 or B, 1, T, T), additive or bool."""
        arguments, states = self.lower.layer_arguments, self.lower.hidden_states
        mask = arguments["attention_mask"]
        if mask is None:
            tokens = torch.arange(states.shape[1], device=states.device)
            distance = tokens[:, None] - tokens
            seen = (distance >= 0) & (distance < (self.model.config.sliding_window or len(tokens)))
            if arguments.get("blocks") is not None:
                assert self.lower.layout is not None
                groups, _ = self.lower.layout.attention_groups
                seen = seen & (groups[:, :, None] == groups[:, None])
            return torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, -math.inf).view(-1, 1, *distance.shape)
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise InputError(
                "method='particle_filter' with padded or packed rows needs attn_implementation='sdpa' or 'eager'"
            )
        return mask

    def step(self, plan: Tensor, start: int, end: int) -> Tensor:
        """Computes logits, (B · K, end - start, V), of the tokens from `start` to `end - 1` under plans (B · K, H)."""
        arguments: dict[str, Any] = dict(self.lower.layer_arguments)
        arguments["cache"], arguments["blocks"] = self.cache, None
        # with a sliding window, the cache holds only the last tokens
        held, _ = self.cache.get_mask_sizes(end - start, self.model.config.plan_layer)
        arguments["attention_mask"] = self._repeat(self.mask[:, :, start:end, end - held : end])
        arguments["position_ids"] = self._repeat(arguments["position_ids"][:, start:end])
        rotation = arguments["position_embeddings"]
        arguments["position_embeddings"] = tuple(self._repeat(part[:, start:end]) for part in rotation)
        states = self.lower.hidden_states[:, start:end].repeat_interleave(self.num_particles, 0)
        plan_vectors = self.model.plan_table(plan)[:, None].expand_as(states)
        stretch = replace(self.lower, hidden_states=states, layer_arguments=arguments)
        return self.model.compute_logits(stretch, plan_vectors)

    def reorder(self, chosen: Tensor) -> None:
        """Replaces the particles of each row by those chosen, (B, K) indices within the row."""
        first = self.num_particles * torch.arange(len(chosen), device=chosen.device)
        self.cache.reorder_cache((chosen + first[:, None]).flatten())

    def _repeat(self, values: Tensor) -> Tensor:
        """Repeats rows for each particle. A single row is broadcast instead."""
        return values if len(values) == 1 else values.repeat_interleave(self.num_particles, 0)


def _plan_starts(layout: PlanLayout) -> list[int]:
    """Columns at which a new plan begins in any row. Between two of them, each row has one plan."""
    changes = (layout.token_plan[:, 1:] != layout.token_plan[:, :-1]).any(0)
    return [0, *(changes.nonzero()[:, 0] + 1).tolist()]


def _document_ends(layout: PlanLayout, column: int) -> Tensor:
    """(B,) bool, whether a new document begins at this column."""
    if layout.token_document is None:
        return torch.zeros(len(layout.token_plan), dtype=torch.bool, device=layout.token_plan.device)
    return layout.token_document[:, column] != layout.token_document[:, column - 1]


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


def _effective_size(log_weights: Tensor) -> Tensor:
    """1 / Σ w² of the normalized weights, (B,): K if all are equal, 1 if a single one dominates."""
    return 1 / log_weights.softmax(1).square().sum(1)


def _systematic(log_weights: Tensor, wanted: Tensor) -> Tensor:
    """Systematic resampling, (B, K) indices: by weight in the rows `wanted`, the identity in the others."""
    batch, count = log_weights.shape
    own = torch.arange(count, device=log_weights.device)
    points = (own + torch.rand(batch, 1, dtype=log_weights.dtype, device=log_weights.device)) / count
    chosen = torch.searchsorted(log_weights.softmax(1).cumsum(1), points).clamp(max=count - 1)
    return torch.where(wanted[:, None], chosen, own)
