"""How the KL's weight and the free bits change during training (FAQ: annealing, up or down)."""

import math

from free_transformer.settings import Schedule, TrainingSettings

RISING_SHARE = 0.5  # of a cycle; the other half stays at its end (Fu et al. 2019, arXiv:1903.10145)


def annealed(schedule: Schedule, start: float, end: float, step: int, steps: int, cycles: int) -> float:
    """
    A value on its way from `start` to `end`, up or down, reached after `steps` steps and kept from then on.

    Args:
        schedule: `"constant"` (always `end`), `"linear"`, `"cosine"` (slow at both ends), or `"cyclical"`: `cycles`
            times linearly from `start` to `end` within half a cycle, then at `end` for the other half.
        step: optimizer steps done before this one.
    """
    if schedule == "constant" or step >= steps:
        return end
    progress = step / steps
    if schedule == "cyclical":
        progress = min(1.0, progress * cycles % 1.0 / RISING_SHARE)
    elif schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


def scheduled_weights(settings: TrainingSettings, free_bits: float, step: int) -> dict[str, float]:
    """`kl_weight` and `free_bits` of a step, for `FreeTransformer.forward`."""
    steps = settings.anneal_steps or settings.max_steps // 2
    cycles = settings.anneal_cycles
    start = settings.free_bits_start
    return {
        "kl_weight": annealed(
            *(settings.kl_schedule, settings.kl_weight_start, settings.kl_weight, step, steps, cycles)
        ),
        "free_bits": annealed(settings.free_bits_schedule, start, free_bits, step, steps, cycles),
    }
