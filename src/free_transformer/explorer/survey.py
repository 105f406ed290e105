"""A survey of the plans of held-out texts, and of the information in each bit."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from free_transformer.errors import InputError
from free_transformer.files import first_line, write_json
from free_transformer.model.plan_text import format_bits
from free_transformer.serving.batch import Batch

SURVEY_FILE = "plans.json"  # in the folder of a model
LIVE_BITS = 0.05  # as in `evaluation.usage`, which needs torch
SNIPPET = 240  # characters
UNLABELED = ""


@dataclass(frozen=True)
class Passage:
    """A piece of held-out text and its source."""

    tokens: list[int]
    source: str = UNLABELED


@dataclass
class BitUse:
    """
    Usage of a bit over all inferred plans.

    Attributes:
        spent: KL divergence of the bit's posterior from the uniform prior, in bits per plan.
        information: upper bound of the mutual information of the bit and the text, in bits per plan.
        ones: share of plans in which the bit is 1.
    """

    spent: float
    information: float
    ones: float

    @property
    def dead(self) -> str | None:
        """Reason why flipping this bit has no effect, or None for a live bit."""
        if self.spent < LIVE_BITS:
            return f"carries nothing: the encoder leaves it random ({self.spent:.2f} bits)"
        if self.information < LIVE_BITS:
            return f"the same in almost all texts: {round(self.ones)} in {max(self.ones, 1 - self.ones):.0%} of plans"
        return None


@dataclass
class PlanSurvey:
    """
    The most likely plans of passages of held-out text.

    Attributes:
        bits: use of each of the H bits.
        counts: number of passages of each source, by the plan's bits.
        snippets: beginning of one passage with each plan.
        passages: number of passages read.
    """

    bits: list[BitUse] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    snippets: dict[str, str] = field(default_factory=dict)
    passages: int = 0

    @property
    def sources(self) -> list[str]:
        """The non-empty sources."""
        return sorted({source for counts in self.counts.values() for source in counts} - {UNLABELED})

    def source(self, plan: str) -> str:
        """Returns the source of most passages with this plan, or UNLABELED if no passage has it."""
        counts = self.counts.get(plan, {})
        return max(counts, key=lambda source: counts[source], default=UNLABELED)

    def save(self, folder: Path) -> None:
        write_json(folder / SURVEY_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path, latent_dim: int) -> "PlanSurvey | None":
        """
        Loads the survey in the folder of a model, or returns None.

        Raises:
            InputError: for a file that is damaged or belongs to another model.
        """
        file = folder / SURVEY_FILE
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found = cls(**{**values, "bits": [BitUse(**bit) for bit in values["bits"]]})
            fits = len(found.bits) == latent_dim and all(len(plan) == latent_dim for plan in found.counts)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file}: cannot be read as a survey of plans ({first_line(error)}); delete it") from error
        if not fits:
            raise InputError(f"{file}: is of a model with other plans than {latent_dim} bits; delete it")
        return found


def survey_plans(
    batch: Batch, passages: Sequence[Passage], max_seconds: float, progress: Callable[[int], None] = lambda read: None
) -> PlanSurvey:
    """
    Infers the most likely plans of as many passages as the time allows.

    Args:
        passages: passages in an order whose beginning is representative.
        progress: called with the number of passages read.
    """
    found, probabilities = PlanSurvey(), []
    end = time.monotonic() + max_seconds
    for passage in passages:
        ones = batch.example_posterior(passage.tokens)
        probabilities.append(ones)
        for plan in format_bits(ones > 0.5).split():
            by_source = found.counts.setdefault(plan, {})
            by_source[passage.source] = by_source.get(passage.source, 0) + 1
            found.snippets.setdefault(plan, batch.texts.decode(passage.tokens)[:SNIPPET])
        found.passages += 1
        progress(found.passages)
        if time.monotonic() > end:
            break
    if probabilities:
        found.bits = _use_of_bits(np.concatenate(probabilities))
    return found


def _use_of_bits(ones: np.ndarray) -> list[BitUse]:
    """
    Args:
        ones: (N, H), the probability of a 1 in each plan.
    """
    mean = ones.mean(0)
    spent = 1 - _entropy(ones).mean(0)
    information = _entropy(mean) - _entropy(ones).mean(0)
    return [BitUse(*map(float, values)) for values in zip(spent, information, mean, strict=True)]


def _entropy(ones: np.ndarray) -> np.ndarray:
    """Returns the entropy of bits, in bits."""
    p = np.clip(ones, 1e-12, 1 - 1e-12)
    entropy: np.ndarray = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return entropy
