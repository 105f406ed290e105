"""
Generation with a 124M shape on one GPU: the Free Transformer and the Llama of its shape, in bf16, random weights.

Both with the default cache, uncompiled, and with a static cache, whose decoding step `generate` compiles and replays as
a CUDA graph.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Results, card, compilations, failed, forget, options_of, synchronize

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.model.initialization import build_baseline

SHAPE = {"hidden_dim": 768, "num_layers": 12, "num_heads": 12, "ffn_hidden_dim": 2048, "vocab_size": 50304}
SMALL = {"hidden_dim": 64, "num_layers": 4, "num_heads": 4, "ffn_hidden_dim": 176, "vocab_size": 512}
CASES = [  # cache and batch size, the most important first
    *(("static", 1), ("dynamic", 1), ("static", 8)),
    *(("dynamic", 64), ("static", 64), ("dynamic", 8)),
]
PROMPT, NEW = 32, 128
WARM_UP_TOKENS = 4  # of a model that is not compiled
ROUNDS = {"static": 5, "dynamic": 2}
MODELS = ("llama", "token", "sequence")


def main() -> None:
    options = options_of(__doc__, "generation.json", 70)
    results = Results(options.out, options.seconds)
    results.record("card", lambda: card(options.device, options.small))
    models = results_of_build(results, options)
    for cache, batch in CASES[:3] if options.small else CASES:
        forget(options.device)
        results.record(f"{cache}_{batch}", lambda c=cache, b=batch: measure(results, models, c, b, options))


def results_of_build(results: Results, options: Any) -> dict[str, Any]:
    models: dict[str, Any] = {}

    def build_all() -> dict[str, int]:
        models.update({name: build(name, options) for name in MODELS})
        return {name: model.num_parameters() for name, model in models.items()}

    results.record("parameters", build_all)
    return models


def build(name: str, options: Any) -> Any:
    torch.manual_seed(0)
    config = FreeTransformerConfig(
        **(SMALL if options.small else SHAPE),
        max_seq_len=1024,
        plan_span=1 if name == "token" else "sequence",
        latent_dim=8,
    )
    with options.device:
        model = build_baseline(config) if name == "llama" else FreeTransformer(config)
    return model.to(torch.bfloat16).eval()


def measure(results: Results, models: dict[str, Any], cache: str, batch: int, options: Any) -> dict[str, Any]:
    """Tokens per second of each model, or its error. The models take turns after each has been compiled."""
    new = 8 if options.small else NEW
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[int], float]] = {}
    for name, model in models.items():
        call = generation(model, cache, batch, options)
        found[name] = results.guarded(lambda c=call, m=model: warm_up(c, m, cache, new))
        if not failed(found[name]):
            calls[name] = call
    graphs = compilations()["graphs"]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 if options.small else ROUNDS[cache]):
        for name, call in calls.items():
            seconds[name].append(call(new))
    for name, times in seconds.items():
        middle = statistics.median(times)
        found[name] |= {"tokens_per_second": batch * new / middle, "seconds": times}
        if "llama" in seconds:
            found[name]["speed_ratio"] = statistics.median(
                llama / own for llama, own in zip(seconds["llama"], times, strict=True)
            )
    return {**found, "compiled_while_timed": compilations()["graphs"] - graphs}


def generation(model: Any, cache: str, batch: int, options: Any) -> Callable[[int], float]:
    """A function that generates a number of tokens after the prompt and returns the seconds it takes."""
    prompt = torch.randint(3, model.config.vocab_size, (batch, PROMPT), device=options.device)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": True, "pad_token_id": 0}
    if cache == "static":
        arguments["cache_implementation"] = "static"

    def call(new: int) -> float:
        synchronize(options.device)
        started = time.perf_counter()
        output = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, **arguments)
        synchronize(options.device)
        seconds = time.perf_counter() - started
        assert output.shape == (batch, PROMPT + new)
        return seconds

    return call


def warm_up(call: Callable[[int], float], model: Any, cache: str, new: int) -> dict[str, Any]:
    """Seconds and compilations of the first call, which may compile. The second call records CUDA graphs."""
    vars(model).pop("_compiled_call", None)  # of another batch size
    torch._dynamo.utils.counters.clear()
    first = call(new if cache == "static" else WARM_UP_TOKENS)
    if cache == "static":
        call(new)
    return {"first_call_s": first, "is_compiled": hasattr(model, "_compiled_call"), **compilations()}


if __name__ == "__main__":
    main()
