"""The curriculum: what each part of a run trains on, and with which weights."""

from dataclasses import dataclass

from free_transformer.settings import Settings, Sources
from free_transformer.settings.schedules import scheduled_weights


@dataclass(frozen=True)
class Stage:
    """
    A part of a run; one without `training.stages` has a single one.

    Attributes:
        number: from 1.
        start, end: the first optimizer step of it, and of the next.
        seq_len, batch_size: tokens of a row, and rows of a micro-batch; their product stays about the same.
        sources: the training text.
        kl_weight, free_bits: None where the schedules of the run decide.
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
        """Whether both take the same rows of the same text: then one reads on where the other has stopped."""
        return (self.seq_len, self.batch_size, self.sources) == (other.seq_len, other.batch_size, other.sources)

    def weights(self, settings: Settings, step: int) -> dict[str, float]:
        """`kl_weight` and `free_bits` of a step, for `FreeTransformer.forward`."""
        scheduled = scheduled_weights(settings.training, settings.model.free_bits, step)
        own = {"kl_weight": self.kl_weight, "free_bits": self.free_bits}
        return {name: scheduled[name] if value is None else value for name, value in own.items()}


def stages_of(settings: Settings) -> list[Stage]:
    """The stages of a run whose `batch_size` is decided; the last goes on to `max_steps`."""
    training, data = settings.training, settings.data
    if not training.stages:
        return [Stage(1, 0, training.max_steps, training.seq_len, training.rows, data.train)]
    left = training.max_steps - sum(stage.steps for stage in training.stages)
    unnamed = sum(stage.steps == 0 for stage in training.stages)
    stages: list[Stage] = []
    for number, stage in enumerate(training.stages, start=1):
        start, length = stages[-1].end if stages else 0, stage.steps
        if length == 0:
            length = left // unnamed
            left, unnamed = left - length, unnamed - 1
        seq_len = stage.seq_len or training.seq_len
        stages.append(
            Stage(
                *(number, start, start + length, seq_len),
                batch_size=round(training.rows * training.seq_len / seq_len),
                sources=data.train if stage.data is None else stage.data,
                kl_weight=stage.kl_weight,
                free_bits=stage.free_bits,
            )
        )
    return stages


def stage_at(stages: list[Stage], step: int) -> Stage:
    """The stage of an optimizer step, from 0; the last one's for all that come after."""
    return next((stage for stage in stages if step < stage.end), stages[-1])
