"""The curriculum of a run: its stages, and the schedules of the KL weight and the free bits."""

import math
from dataclasses import dataclass

from free_transformer.settings.paths import Sources
from free_transformer.settings.sections import Settings
from free_transformer.settings.training_sections import Schedule

RISING_SHARE = 0.5  # of a cycle; the value then stays constant (Fu et al. 2019, arXiv:1903.10145)


def annealed(schedule: Schedule, start: float, end: float, step: int, steps: int, cycles: int) -> float:
    """
    Returns a scheduled value, which goes from `start` to `end` in `steps` steps and then stays at `end`.

    Args:
        schedule: `"constant"` (always `end`), `"linear"`, `"cosine"` (slow at both ends), or `"cyclical"`: in each of
            `cycles` cycles, linear from `start` to `end` in the first half, then constant.
        step: number of optimizer steps before this one.
    """
    if schedule == "constant" or step >= steps:
        return end
    progress = step / steps
    if schedule == "cyclical":
        progress = min(1.0, progress * cycles % 1.0 / RISING_SHARE)
    elif schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


def scheduled_weights(settings: Settings, step: int) -> dict[str, float]:
    """`kl_weight` and `free_bits` of a step."""
    curriculum, free_bits, kl_weight = settings.curriculum, settings.model.free_bits, settings.training.kl_weight
    steps, cycles = curriculum.anneal_steps or settings.training.max_steps // 2, curriculum.anneal_cycles
    return {
        "kl_weight": annealed(curriculum.kl_schedule, curriculum.kl_weight_start, kl_weight, step, steps, cycles),
        "free_bits": annealed(
            curriculum.free_bits_schedule, curriculum.free_bits_start, free_bits, step, steps, cycles
        ),
    }


@dataclass(frozen=True)
class Stage:
    """
    A part of a run; a run without `curriculum.stages` has one stage.

    Attributes:
        number: index of the stage, counted from 1.
        start, end: the first optimizer step of this stage and of the next.
        seq_len, batch_size: tokens per row, and rows per micro-batch; their product is about the same in all stages.
        sources: sources of the training text.
        kl_weight, free_bits: None to use the schedules of the run.
    """

    number: int
    start: int
    end: int
    seq_len: int
    batch_size: int
    sources: Sources
    kl_weight: float | None = None
    free_bits: float | None = None

    def reads_as(self, other: "Stage") -> bool:
        """Whether both stages read the same rows of the same text, so that one can continue the other's stream."""
        return (self.seq_len, self.batch_size, self.sources) == (other.seq_len, other.batch_size, other.sources)

    def weights(self, settings: Settings, step: int) -> dict[str, float]:
        """`kl_weight` and `free_bits` of a step."""
        scheduled = scheduled_weights(settings, step)
        own = {"kl_weight": self.kl_weight, "free_bits": self.free_bits}
        return {name: scheduled[name] if value is None else value for name, value in own.items()}


def stages_of(settings: Settings) -> list[Stage]:
    """Returns the stages of a run, whose `batch_size` must be a number. The last stage ends at `max_steps`."""
    training, curriculum, data = settings.training, settings.curriculum, settings.data
    if not curriculum.stages:
        return [Stage(1, 0, training.max_steps, training.seq_len, training.rows, data.train)]
    left = training.max_steps - sum(stage.steps for stage in curriculum.stages)
    unnamed = sum(stage.steps == 0 for stage in curriculum.stages)
    stages: list[Stage] = []
    for number, stage in enumerate(curriculum.stages, start=1):
        start, length = stages[-1].end if stages else 0, stage.steps
        if length == 0:
            length = left // unnamed
            left, unnamed = left - length, unnamed - 1
        seq_len = stage.seq_len or training.seq_len
        stages.append(
            Stage(
                number,
                start,
                start + length,
                seq_len,
                batch_size=round(training.rows * training.seq_len / seq_len),
                sources=data.train if stage.data is None else stage.data,
                kl_weight=stage.kl_weight,
                free_bits=stage.free_bits,
            )
        )
    return stages


def stage_at(stages: list[Stage], step: int) -> Stage:
    """Returns the stage of an optimizer step, counted from 0; the last stage for all later steps."""
    return next((stage for stage in stages if step < stage.end), stages[-1])
