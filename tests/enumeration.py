"""References for tests: sums over all plans, in float64."""

import torch

from free_transformer import codes_to_bits

# a model small enough that all its plans can be enumerated
SIZES = {
    "vocab_size": 12,
    "hidden_dim": 16,
    "ffn_hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "max_seq_len": 32,
    "latent_dim": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def all_plans(num_bits: int) -> torch.Tensor:
    return codes_to_bits(torch.arange(2**num_bits), num_bits)


def vectors(weight: torch.Tensor, group_bits: list[int], plans: torch.Tensor) -> torch.Tensor:
    """The plans' vectors, group by group, row by row: (N, H) -> (N, D)."""
    total, first_bit, first_row = 0, 0, 0
    for bits in group_bits:
        codes = sum(plans[:, first_bit + h].long() << h for h in range(bits))
        total = total + weight[first_row + codes]
        first_bit, first_row = first_bit + bits, first_row + 2**bits
    return total


def enumerated_gradient(
    grad: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor, group_bits: list[int]
) -> torch.Tensor:
    """∂/∂logits of Σ_z Q(z) grad · table[z], by autograd in float64 through the product of the probabilities."""
    logits = logits.detach().double().requires_grad_()
    plans = all_plans(sum(group_bits))  # (2^H, H)
    p = logits.sigmoid()[..., None, :]
    q = torch.where(plans, p, 1 - p).prod(-1)  # (..., 2^H)
    values = grad.double() @ vectors(weight.detach().double(), group_bits, plans).T
    return torch.autograd.grad((q * values).sum(), logits)[0]
