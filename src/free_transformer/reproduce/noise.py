"""
The minimum of the objective for the noise of the letters task, independent of any network.

Each character is `!` with probability 1/16. Its plan of H bits has a posterior with independent bits, as in the model,
and the decoder is optimal (Bayes' rule). The objective is then a function of 2H numbers. Its minimum shows how much of
the noise the plan should carry, and how much noise plans from the uniform prior then generate.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from free_transformer.data.letters import LENGTH, NOISE
from free_transformer.model.losses import free_bits_hinge, kl_bits
from free_transformer.model.plan import codes_to_bits

STARTS, STEPS, RATE = 32, 400, 0.1


@dataclass
class NoiseOptimum:
    """
    Attributes:
        saved: decrease of the objective when the plan carries the noise, in nats per string.
        rate: rate of `!` under plans from the uniform prior. The task's is 1/16.
        overlap_shared: Jaccard index of the `!` of two strings with the same plan.
        overlap_independent: Jaccard index of the `!` of two strings with different plans.
    """

    saved: float
    rate: float
    overlap_shared: float
    overlap_independent: float


def noise_optimum(free_bits: float, latent_dim: int = 8) -> NoiseOptimum:
    """Returns the best of `STARTS` gradient descents in float64, for one plan per character. Deterministic."""
    bits = codes_to_bits(torch.arange(2**latent_dim), latent_dim)
    generator = torch.Generator().manual_seed(0)
    initial = 2 * torch.randn(STARTS, 2, latent_dim, dtype=torch.float64, generator=generator)
    logits = initial.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            loss, _ = _objective(logits, bits, free_bits)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            rates.step()
    loss, noise = _objective(logits.detach(), bits, free_bits)
    best = noise[loss.argmin()]
    entropy = -NOISE * math.log(NOISE) - (1 - NOISE) * math.log(1 - NOISE)
    return NoiseOptimum(
        saved=LENGTH * (entropy - float(loss.min())),
        rate=float(best.mean()),
        overlap_shared=float(best.square().mean() / (1 - (1 - best).square()).mean()),
        overlap_independent=float(best.mean() / (2 - best.mean())),
    )


def _objective(logits: Tensor, bits: Tensor, free_bits: float) -> tuple[Tensor, Tensor]:
    """
    Args:
        logits: (N, 2, H), posterior logits of a character that is not `!` and of one that is.
        bits: (2^H, H) bool, all plans.

    Returns:
        the objective in nats per character, (N,), and the decoder's probability of `!` under each code, (N, 2^H).
    """
    weight = torch.tensor([1 - NOISE, NOISE], dtype=logits.dtype)
    log_posterior = F.logsigmoid(torch.where(bits, logits[:, :, None], -logits[:, :, None])).sum(-1)
    log_joint = log_posterior + weight.log()[:, None]  # (N, 2, 2^H)
    log_decoder = log_joint - log_joint.logsumexp(1, keepdim=True)
    reconstruction = -(log_joint.exp() * log_decoder).sum((1, 2))
    hinge = (free_bits_hinge(kl_bits(logits), free_bits) * weight).sum(1)
    return reconstruction + math.log(2) * hinge, log_decoder[:, 1].exp()
