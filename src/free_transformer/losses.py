"""The objective and its parts; the code is in `model/losses.py`."""

from free_transformer.model.losses import (
    Objective,
    aggregate_divergence,
    free_bits_hinge,
    kl_bits,
    kl_bits_per_bit,
    min_bits_shortfall,
    objective,
    predicted_tokens,
    reconstruction_loss,
)

__all__ = [
    "Objective",
    "aggregate_divergence",
    "free_bits_hinge",
    "kl_bits",
    "kl_bits_per_bit",
    "min_bits_shortfall",
    "objective",
    "predicted_tokens",
    "reconstruction_loss",
]
