"""Runs, outcomes and checks that the tests of the command line share."""

import re
from pathlib import Path
from typing import NamedTuple

from free_transformer.settings import Settings, parse_settings

KINDS = ["free", "baseline"]
BITS = 3
TEXT = "".join(f"the cat number {i} sat on a mat. a dog ran home again. " for i in range(30))


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def tiny_settings(folder: Path, kind: str) -> Settings:
    model = {"kind": kind, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "latent_dim": BITS}
    training = {"max_steps": 20, "batch_size": 4, "seq_len": 16, "log_every": 5, "eval_every": 10, "device": "cpu"}
    training["prior_rows"] = 32  # gathering plans of the default 1,024 rows takes a second per run
    text = [str(folder / "text.txt")]
    return parse_settings(
        {
            "run_dir": str(folder / kind),
            "model": model,
            "training": {**training, "learning_rate": 1e-2, "warmup_steps": 2, "eval_rows": 8},
            "data": {"train": text, "validation": text},
            "logging": {"tensorboard": False, "sample_every": 0, "sample_tokens": 4},
        }
    )


def assert_refused(outcome: Outcome, status: int, message: str) -> None:
    """The exit status, and one clear line on standard error."""
    assert outcome.status == status, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("free-transformer: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in outcome.out + outcome.err


def texts_of(outcome: Outcome) -> list[str]:
    """The text under each sample's title."""
    assert outcome.status == 0, outcome
    return [part.split("\n", 1)[1] for part in re.split(r"^(?=sample \d+)", outcome.out, flags=re.M)[1:]]


def everything_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
