"""
Texts longer than the context: compares methods to shorten the context by how well they predict text.

    re-read    when the context is full, drop the cache and read the last half again (`free_transformer.model.context`)
    sliding    read the last full context again for every token (the reference; one context of FLOPs per token)
    sinks      keep the first 4 tokens and a rolling cache of the others, with keys rotated to their places in the cache
    all        drop nothing: positions continue beyond the trained length

All methods predict the same tokens, under the plan that the encoder reads from the beginning of the text. Tokens are
counted from the point where the context was read again; the first ones have the shortest context.
`make bench-long-text`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from free_transformer.model.cache import PlanState
from free_transformer.model.modeling import FreeTransformer
from free_transformer.reporting.table import Table
from free_transformer.runs.run import Run

CONFIG = Path(__file__).parents[1] / "configs" / "three_styles.yaml"
SINKS = 4
SEAM = 16  # tokens after the context was read again


@dataclass
class RollingCache:
    """Keys and values of the first tokens and of the last ones, in place of a cache of `transformers`."""

    limit: int
    inverse_frequencies: Tensor
    is_compileable: bool = False

    def __post_init__(self) -> None:
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.states[0][0].shape[2] if self.states else 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.states:
            key, value = (torch.cat(pair, 2) for pair in zip(self.states[layer], (key, value), strict=True))
        self.states[layer] = key, value
        return key, value

    def make_room(self) -> None:
        """Drops the oldest token after the sinks, and rotates the keys of later tokens back by one position."""
        angles = torch.cat([-self.inverse_frequencies] * 2)
        cos, sin = angles.cos(), angles.sin()
        for layer, (key, value) in self.states.items():
            moved = key[:, :, SINKS + 1 :]
            first, second = moved.chunk(2, -1)
            moved = moved * cos + torch.cat([-second, first], -1) * sin
            self.states[layer] = (
                torch.cat([key[:, :, :SINKS], moved], 2),
                torch.cat([value[:, :, :SINKS], value[:, :, SINKS + 1 :]], 2),
            )


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL of each token in nats, from logits (..., V)."""
    return -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def reread(model: FreeTransformer, texts: Tensor, plan: Tensor, limit: int, starts: list[int]) -> Tensor:
    """NLL of the tokens predicted from contexts that begin at `starts`, (B, starts, tokens)."""
    half, found = limit // 2, []
    for start in starts:
        logits = model(texts[:, start : start + limit], plan=plan, use_cache=False).logits[:, half - 1 :]
        found.append(nll(logits, texts[:, start + half : start + limit + 1]))
    return torch.stack(found, 1)


def sliding(model: FreeTransformer, texts: Tensor, plan: Tensor, limit: int, starts: list[int]) -> Tensor:
    """As `reread`, each token from the last `limit` tokens before it."""
    found = []
    for start in starts:
        per_token = []
        for place in range(start + limit // 2, start + limit + 1):
            seen = texts[:, place - limit : place]
            logits = model(seen, plan=plan, use_cache=False, logits_to_keep=1).logits[:, -1]
            per_token.append(nll(logits, texts[:, place]))
        found.append(torch.stack(per_token, 1))
    return torch.stack(found, 1)


def step_by_step(model: FreeTransformer, texts: Tensor, plan: Tensor, cache: RollingCache) -> Tensor:
    """NLL of tokens 1, 2, ..., each read once, (B, T - 1); a full cache drops a token."""
    state, found = PlanState(plan=plan, columns=0, padded=False), []
    for place in range(texts.shape[1] - 1):
        if cache.get_seq_length() == cache.limit:
            cache.make_room()
        position = torch.full((len(texts), 1), cache.get_seq_length())
        out = model(texts[:, place : place + 1], position_ids=position, past_key_values=cache, plan=state)  # type: ignore[arg-type]
        found.append(nll(out.logits[:, -1], texts[:, place + 1]))
    return torch.stack(found, 1)


def held_out_texts(run: Run, length: int, count: int) -> Tensor:
    """Evenly spaced pieces of the held-out documents that are long enough, (count, length) tokens."""
    tokenizer, pieces = run.load_tokenizer(), []
    for source in run.settings.data.validation:
        for line in Path(source).read_text(encoding="utf-8").splitlines():
            tokens = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
            pieces += [tokens[at : at + length] for at in range(0, len(tokens) - length, length)]
    chosen = np.linspace(0, len(pieces) - 1, min(count, len(pieces))).astype(int)
    return torch.tensor([pieces[index] for index in chosen])


def compare(model: FreeTransformer, texts: Tensor, limit: int, windows: int) -> dict[str, Tensor]:
    """NLL of the same tokens by each method, (B, contexts, tokens)."""
    period, half = limit - limit // 2 + 1, limit // 2
    # beginnings of re-read contexts, spread over the text, without the first
    every = [limit + 1 - half + index * period for index in range((windows - 1) * limit // period)]
    starts = every[:: max(1, len(every) // 3)]
    plan = model.infer_plan(texts[:, :limit]) > 0
    frequencies = model.model.rotary_emb.inv_freq
    rolling = step_by_step(model, texts, plan, RollingCache(limit, frequencies))
    everything = nll(model(texts[:, :-1], plan=plan, use_cache=False).logits, texts[:, 1:])
    places = torch.stack([torch.arange(start + half, start + limit + 1) for start in starts]) - 1
    return {
        "sliding": sliding(model, texts, plan, limit, starts),
        "re-read": reread(model, texts, plan, limit, starts),
        "sinks": rolling[:, places],
        "all": everything[:, places],
    }


def difference(values: Tensor, reference: Tensor) -> str:
    """Mean difference of the NLL, and its standard error over texts."""
    per_text = (values - reference).flatten(1).mean(1)
    return f"{per_text.mean():+.4f} ± {per_text.std() / len(per_text) ** 0.5:.4f}"


def table(found: dict[str, Tensor]) -> Table:
    reference, rows = found["sliding"], []
    last = SEAM * (reference.shape[2] // SEAM - 1)
    for name, values in found.items():
        seam = difference(values[:, :, :SEAM], reference[:, :, :SEAM])
        end = difference(values[:, :, last:], reference[:, :, last:])
        rows.append([name, f"{values.mean():.4f}", difference(values, reference), seam, end])
    seams = (f"first {SEAM} after re-reading", f"last {SEAM} before it")
    header = ["method", "NLL, nats per token", "minus sliding", *seams]
    return Table(
        header, rows, f"{reference.numel():,} held-out tokens beyond the trained length, the same for all methods"
    )


@torch.no_grad()
def main(
    run: Annotated[Path | None, typer.Argument(help="run with one plan per text; default: trained in --out")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run that is trained")] = Path("runs/long_text"),
    steps: Annotated[int, typer.Option(help="training steps of that run")] = 1150,
    texts: Annotated[int, typer.Option(help="held-out texts")] = 48,
    windows: Annotated[int, typer.Option(help="length of a text, in contexts")] = 8,
) -> None:
    """Trains the demo's model if no run is given, and prints the table."""
    opened = Run.open(train_run(out, steps) if run is None else run)
    model = opened.load_model().float().eval()
    limit = model.config.max_position_embeddings
    print(table(compare(model, held_out_texts(opened, windows * limit + 1, texts), limit, windows)).to_markdown())


def train_run(out: Path, steps: int) -> Path:
    """The demo's run, optionally with fewer steps."""
    sys.path.insert(0, str(Path(__file__).parent))
    from collapse import write_text_of_styles

    from free_transformer.training import load_settings, train

    if not (out / "text" / "validation.jsonl").exists():
        write_text_of_styles(out / "text")
    text = [f"data.{part}=[{out / 'text' / part}.jsonl]" for part in ("train", "validation")]
    options = [f"run_dir={out / 'run'}", f"training.max_steps={steps}", "logging.sample_every=0", *text]
    with torch.enable_grad():
        train(load_settings(CONFIG, options), quiet=True)
    return out / "run"


if __name__ == "__main__":
    typer.run(main)
