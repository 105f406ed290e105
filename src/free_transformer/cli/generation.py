"""The request of `free-transformer generate`, parsed from its options."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from free_transformer.errors import InputError
from free_transformer.model.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """The options of `free-transformer generate`."""

    prompt: str
    plan: str | None
    plan_changes: dict[int, str]
    plan_from: Path | None
    prompt_plan: str
    prior: str
    plans: str
    plan_strength: float | None
    num_samples: int
    max_new_tokens: int
    sampling: Sampling
    stream: bool
    seed: int

    @property
    def has_plan(self) -> bool:
        return self.plan is not None or self.plan_from is not None or bool(self.plan_changes)


class SamplingOptions(TypedDict, total=False):
    """Sampling options of `generate`."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float


def plan_changes(options: Sequence[str]) -> dict[int, str]:
    """Parses `--plan-change` to plans by the number of new tokens before them. Raises `InputError`."""
    found: dict[int, str] = {}
    for option in options:
        start, colon, plan = option.partition(":")
        if not colon or not (start.isascii() and start.isdigit()):
            raise InputError(f"--plan-change {option}: give TOKENS:PLAN, such as 2000:10010110")
        if int(start) in found:
            raise InputError(f"--plan-change {option}: there is another plan for token {start}; give only one")
        found[int(start)] = plan
    return found


def sampling_options(sampling: Sampling) -> SamplingOptions:
    """Returns the options of `generate`; they override the `generation_config.json` of a converted model."""
    if sampling.greedy:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
