"""
How the cost grows: a training step by text length, the plan by bits, the encoder by number of plans.

A curve's exponent is the slope of a straight line through the logarithms of times or counted FLOPs. Turns are
interleaved, times are medians. `make bench` updates the section of docs/performance.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from comparison_report import RESULTS, exponent, operations, write_report
from plan_cost import PLANS, WIDTH, Variant, plan_part, step_on
from rich.console import Console
from rich.progress import track

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.settings import Settings
from free_transformer.training.optimizers import build_optimizers

SHAPE = {"vocab_size": 4096, "hidden_dim": 256, "num_layers": 6, "num_heads": 4, "ffn_hidden_dim": 688, "latent_dim": 8}
LENGTHS = [2**power for power in range(7, 14)]
EXACT_BITS = [1, 2, 4, 6, 8, 10, 12, 14]
SAMPLED_BITS = [1, 2, 4, 8, 12, 16]
GROUPED_BITS = [8, 24, 32, 40, 48, 64]  # in groups of 8, as from 17 bits on by default
SPANS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
ROWS, LENGTH = 8, 256

ADAMW = Settings.model_validate({"optimizer": {"name": "adamw"}})


def step_of_length(length: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = FreeTransformer(FreeTransformerConfig(**SHAPE, max_seq_len=length))
    return step_on(
        model,
        build_optimizers(model, ADAMW),
        torch.randint(3, 4096, (1, length)),
    )


def encoder_of_span(span: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = FreeTransformer(FreeTransformerConfig(**SHAPE, max_seq_len=LENGTH, plan_span=span))
    with torch.no_grad():
        lower = model.lower_layers(torch.randint(3, 4096, (ROWS, LENGTH)))
    lower.hidden_states.requires_grad_()
    grad = torch.randn(ROWS, -(-LENGTH // span), 8)

    def run() -> None:
        model.encode(lower).backward(grad)
        lower.hidden_states.grad = None
        model.encoder.zero_grad()

    return run


def encoder_operations(span: int) -> float:
    """FLOPs: keys and values of all tokens; attention, output and MLP of the plans only; forward and backward."""
    tokens, plans = ROWS * LENGTH, ROWS * LENGTH // span
    return 6.0 * (tokens * 2 * WIDTH**2 + plans * (WIDTH**2 + 3 * WIDTH * 688)) + 14.0 * plans * LENGTH * WIDTH


def plan_operations(bits: int, method: str) -> float:
    """FLOPs of the straight-through gradient: all rows of each codebook, or the sampled rows and those one bit away."""
    groups = Variant("", bits).config.group_bits if method == "grouped" else [bits]
    rows = bits + len(groups) if method == "sampled" else sum(2**each for each in groups)
    return 2.0 * PLANS * WIDTH * rows


def curves() -> list[dict[str, Any]]:
    title = "6 layers of width 256, 1 x {} tokens"
    return [
        {
            "title": "training step, by tokens per text",
            "x": LENGTHS,
            "turn": step_of_length,
            "operations": lambda length: operations(title.format(length), True, length),
        },
        *(
            {
                "title": f"plan part, {method}, by {'rows of its codebook' if method == 'exact' else 'bits'}",
                "x": bits,
                "turn": lambda each, m=method: plan_part(Variant("", each, "exact" if m == "grouped" else m)),
                "operations": lambda each, m=method: plan_operations(each, m),
                "scale": (lambda each: 2**each) if method == "exact" else (lambda each: each),
            }
            for method, bits in (("exact", EXACT_BITS), ("sampled", SAMPLED_BITS), ("grouped", GROUPED_BITS))
        ),
        {
            "title": "encoder, forward and backward, by plans per text",
            "x": SPANS,
            "turn": encoder_of_span,
            "operations": encoder_operations,
            "scale": lambda span: LENGTH // span,
        },
    ]


def measure(curve: dict[str, Any], rounds: int) -> dict[str, Any]:
    turns = {x: curve["turn"](x) for x in curve["x"]}
    seconds: dict[int, list[float]] = {x: [] for x in turns}
    for turn in track(range(rounds + 1), curve["title"]):
        for x, run in turns.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[x].append(time.perf_counter() - started)
    scale = curve.get("scale", lambda x: x)
    points = [
        {"x": scale(x), "seconds": statistics.median(taken), "operations": curve["operations"](x)}
        for x, taken in seconds.items()
    ]
    points.sort(key=lambda point: point["x"])
    return {"title": curve["title"], "points": points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each point, after one warm-up turn")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["curves"] = [measure(curve, options.rounds) for curve in curves()]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_report(results)
    for curve in results["curves"]:
        found, counted = (exponent(curve["points"], of) for of in ("seconds", "operations"))
        Console().print(f"{curve['title']}: exponent {found:.2f}, of FLOPs {counted:.2f}")


if __name__ == "__main__":
    main()
