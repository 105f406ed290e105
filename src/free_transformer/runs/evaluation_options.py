"""Options of an evaluation, without torch: the command line reads its defaults here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    """
    Attributes:
        data: files, folders or data sets of held-out text; empty for the run's `data.validation`.
        num_samples: number of plans sampled for each text, at least 1.
        method: `"importance"`, `"particle_filter"` or `"exact"`, as `evaluate_likelihood` explains.
        prior: prior of the plans, `"uniform"` or `"aggregate"`.
        max_rows: maximum number of rows, sampled at random from the text.
        batch_size: number of rows per batch.
        seed: seed of the sampled rows and plans.
    """

    data: tuple[str, ...] = ()
    num_samples: int = 16
    method: str = "importance"
    prior: str = "uniform"
    max_rows: int = 1000
    batch_size: int = 32
    seed: int = 0
