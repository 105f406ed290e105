"""
The straight-through gradient over the 2^16 codes of the paper's shape, exact and sampled, and the codebook's optimizer.

Times are those of the operators only. The share of a training step needs the results of `training.py` beside `--out`.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Results, card, failed, forget, options_of, peak_gb, timed
from torch import Tensor

from free_transformer import FreeTransformerConfig
from free_transformer.model.losses import free_bits_hinge, kl_bits
from free_transformer.model.plan import BinaryMapper, PlanTable, bits_to_codes
from free_transformer.model.straight_through import exact_gradient, sampled_gradient
from free_transformer.training.optimizers import BETAS, RowAdamW

WIDTH, BITS = 1536, 16
PLANS = (8192, 2048)
PLANS_PER_STEP = 8192  # of the training step with one plan per token
CHUNKS = {"": FreeTransformerConfig.plan_chunk_bytes, "_large_chunks": 2**28}  # bytes
ERROR_SHAPE = {"plans": 256, "width": 512, "bits": 12}


def main() -> None:
    options = options_of(__doc__, "plan_gradient.json", 20)
    results = Results(options.out, options.seconds)
    results.record("card", lambda: card(options.device, options.small))
    results.record("relative_error", lambda: errors(options))
    step = step_seconds(options)
    width, bits = (32, 10) if options.small else (WIDTH, BITS)
    for rule in ("sparse_adam", "adamw"):
        forget(options.device)
        results.record(f"update_{rule}", lambda rule=rule: update(rule, width, bits, options, step))
    for plans in (64,) if options.small else PLANS:
        forget(options.device)
        results.record(f"plan_part_{plans}", lambda n=plans: plan_part(n, width, bits, options, step))
        inputs = functools.partial(random_inputs, plans, width, bits, options.device)
        for kind in ("sampled", "exact", "exact_tf32"):
            for suffix, chunk in CHUNKS.items():
                forget(options.device)
                measure = functools.partial(gradient, kind, chunk, bits, inputs, options, step)
                results.record(f"{kind}{suffix}_{plans}", measure)


def step_seconds(options: Any) -> float | None:
    """Seconds of the training step with one plan per token, if it was measured."""
    path = options.out.parent / "training.json"
    found = json.loads(path.read_text()).get("token_2048", {}) if path.exists() and not options.small else {}
    return None if failed(found) else found.get("seconds")


def random_inputs(plans: int, width: int, bits: int, device: torch.device) -> tuple[Tensor, ...]:
    """Gradient at the plans' vectors, logits, codebook, and the sampled plans."""
    torch.manual_seed(0)
    with device:
        grad, logits, weight = torch.randn(plans, width), torch.randn(plans, bits), torch.randn(2**bits, width)
        return grad, logits, weight, torch.rand(plans, bits) < logits.sigmoid()


def estimate(kind: str, inputs: tuple[Tensor, ...], bits: int, chunk: int) -> Tensor:
    grad, logits, weight, plan = inputs
    if kind == "sampled":
        return sampled_gradient(grad, logits, weight, plan, bits_to_codes(plan)[:, None], [bits], chunk)
    with tf32(kind == "exact_tf32"):
        return exact_gradient(grad, logits, weight, [bits], chunk)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def gradient(
    kind: str, chunk: int, bits: int, inputs: Callable[[], tuple[Tensor, ...]], options: Any, step: float | None
) -> dict[str, Any]:
    values = inputs()
    held = sum(each.numel() * each.element_size() for each in values) / 1e9
    found = timed(lambda: estimate(kind, values, bits, chunk), options.device)
    return {
        **found,
        "chunk_mb": chunk / 2**20,
        "extra_gb": max(0.0, peak_gb(options.device) - held),
        "share_of_step": share(found["seconds"], len(values[0]), step),
    }


def share(seconds: float, plans: int, step: float | None) -> float | None:
    return seconds / step if step and plans == PLANS_PER_STEP else None


def errors(options: Any) -> dict[str, float]:
    """Relative error of each estimate against float64 on the CPU; the sampled one for the same plans."""
    shape = {"plans": 16, "width": 16, "bits": 6} if options.small else ERROR_SHAPE
    inputs, bits = random_inputs(**shape, device=options.device), shape["bits"]
    found = {}
    for kind in ("exact", "exact_tf32", "sampled"):
        wide = tuple(each.cpu().double() if each.is_floating_point() else each.cpu() for each in inputs)
        expected = estimate(kind, wide, bits, 2**26)
        error = estimate(kind, inputs, bits, 2**26).cpu().double() - expected
        found[kind] = float(error.norm() / expected.norm())
    return found


def plan_part(plans: int, width: int, bits: int, options: Any, step: float | None) -> dict[str, Any]:
    """Sampling of plans, lookup, sampled straight-through gradient and KL, forward and backward."""
    with options.device:
        table, mapper = PlanTable([bits], width, "sampled"), BinaryMapper()
        logits, grad = torch.randn(1, plans, bits, requires_grad=True), torch.randn(1, plans, width)
        one = torch.ones(())
    table.sparse = True

    def run() -> None:
        states = table(mapper(logits.detach()), logits)
        hinge = free_bits_hinge(kl_bits(logits), 0.5).sum()
        torch.autograd.backward([states, hinge], [grad, one])
        logits.grad = table.weight.grad = None

    found = timed(run, options.device)
    return {**found, "share_of_step": share(found["seconds"], plans, step)}


def update(rule: str, width: int, bits: int, options: Any, step: float | None) -> dict[str, Any]:
    """Gradient of the lookup of a step's plans and the optimizer's step of the codebook, by row or dense."""
    plans = 64 if options.small else PLANS_PER_STEP
    with options.device:
        weight = torch.nn.Parameter(torch.randn(2**bits, width))
        codes, grad = torch.randint(2**bits, (plans,)), torch.randn(plans, width)
    sparse = rule == "sparse_adam"
    group = {"params": [weight], "by_row": sparse, "weight_decay": 0.0}
    optimizer = RowAdamW([group], lr=1e-4, betas=BETAS, fused=True)

    def run() -> None:
        torch.nn.functional.embedding(codes, weight, sparse=sparse).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    found = timed(run, options.device)
    return {**found, "peak_gb": peak_gb(options.device), "share_of_step": share(found["seconds"], plans, step)}


if __name__ == "__main__":
    main()
