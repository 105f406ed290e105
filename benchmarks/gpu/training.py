"""
Training steps of the paper's 1.5B shape on one GPU: the Free Transformer and the Llama of its shape.

The step is that of `free-transformer train`: bf16 by autocast, weights and optimizer state in fp32, compiled blocks,
gradient clipping, AdamW. The Llama also runs with its loss computed in chunks, as in this library, so that the
remaining difference is the plan. It is measured first and last, to show how much the card drifts.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import Results, card, compilations, forget, options_of, peak_gb, timed
from profiling import host_syncs, profile_steps
from torch import Tensor, nn

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import Rows
from free_transformer.distributed.parallelize import parallelize
from free_transformer.distributed.processes import Processes
from free_transformer.model.initialization import build_baseline
from free_transformer.model.losses import chunked_reconstruction_loss
from free_transformer.settings import Settings
from free_transformer.training.checkpoint import TrainState
from free_transformer.training.optimizers import build_optimizers
from free_transformer.training.step import agree_on_step, apply_gradients, compute_gradients, with_layout

PAPER = {
    "hidden_dim": 1536,
    "num_layers": 28,
    "num_heads": 12,
    "num_kv_heads": 2,
    "ffn_hidden_dim": 8960,
    "vocab_size": 2**17,
    "latent_dim": 16,
    "tie_embeddings": False,
}
SMALL = {**PAPER, "hidden_dim": 64, "num_layers": 4, "num_heads": 4, "ffn_hidden_dim": 176, "vocab_size": 512}
SYNC_SHAPE = {**PAPER, "hidden_dim": 512, "num_layers": 4, "num_heads": 4, "ffn_hidden_dim": 1408, "vocab_size": 2**15}
ROWS_BY_LENGTH = {2048: 4, 4096: 2}
SMALL_ROWS_BY_LENGTH = {32: 4, 64: 2}
VARIANTS = {
    0: ("llama", "token", "sequence", "llama_chunked", "llama_again"),  # by place among the lengths
    1: ("llama", "token", "sequence", "llama_chunked"),
}
PROFILED = ("llama", "token")
DOCUMENTS = ("whole", "packed", "packed_and_padded")


class ChunkedLlama(nn.Module):
    """A Llama with the loss of the Free Transformer, which stores the logits of some tokens at a time."""

    def __init__(self, llama: Any):
        super().__init__()
        self.llama, self.config = llama, llama.config

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: int, **_: Any) -> Any:
        states = self.llama.model(input_ids=input_ids, use_cache=False).last_hidden_state
        total = chunked_reconstruction_loss(states, self.llama.lm_head.weight, labels, fused=states.is_cuda)
        return SimpleNamespace(loss=total / num_items_in_batch)


def main() -> None:
    options = options_of(__doc__, "training.json", 170)
    results = Results(options.out, options.seconds)
    results.record("card", lambda: card(options.device, options.small))
    lengths = SMALL_ROWS_BY_LENGTH if options.small else ROWS_BY_LENGTH
    for place, (length, rows) in enumerate(lengths.items()):
        for variant in VARIANTS[place]:
            measure_variant(results, variant, (rows, length), options, with_profile=place == 0)
        if place == 0:
            for span in (1, "sequence"):
                forget(options.device)
                name = f"syncs_{'token' if span == 1 else span}"
                results.record(name, lambda span=span: syncs_of_span(span, options))


def measure_variant(results: Results, variant: str, shape: tuple[int, int], options: Any, with_profile: bool) -> None:
    """Records the step of a variant and, for some variants, a profile and waits for the GPU."""
    forget(options.device)
    built: list[Any] = []

    def step_time() -> dict[str, Any]:
        model, step = build_step(variant, shape, options)
        values = measure(model, step, shape, options, results.values["card"].get("bf16_tflops"))
        built.extend((model, step))
        return values

    results.record(f"{variant}_{shape[1]}", step_time)
    if built and with_profile and variant in PROFILED:
        model, step = built
        results.record(f"profile_{variant}", lambda: profile_steps(model, step, options.device))
        results.record(f"syncs_compiled_{variant}", lambda: host_syncs(step, options.device))


def measure(
    model: Any, step: Callable[[], None], shape: tuple[int, int], options: Any, tflops: float | None
) -> dict[str, Any]:
    """
    Args:
        shape: rows and tokens per row of a step.
        tflops: of the card, measured.
    """
    tokens = shape[0] * shape[1]
    found: dict[str, Any] = timed(step, options.device, 2 if options.small else 10)
    flops = flops_per_token(model, shape[1])
    rate = flops * tokens / found["seconds"] / 1e12
    return {
        **found,
        "tokens_per_second": tokens / found["seconds"],
        "flops_per_token": flops,
        "tflops": rate,
        "mfu": rate / tflops if tflops else None,
        "peak_gb": peak_gb(options.device),
        "parameters": sum(each.numel() for each in model.parameters()),
        **compilations(),
    }


def build_step(variant: str, shape: tuple[int, int], options: Any) -> tuple[Any, Callable[[], None]]:
    """The model of a variant, compiled block by block, and its training step on whole rows of random tokens."""
    span = 1 if variant == "token" else "sequence"
    config = FreeTransformerConfig(**(SMALL if options.small else PAPER), max_seq_len=shape[1], plan_span=span)
    state = new_state(config, variant in ("token", "sequence"), options.device, compile_blocks=not options.small)
    if variant == "llama_chunked":
        state.model = ChunkedLlama(state.model)
    return state.model, training_step(state, random_rows("whole", shape, config.vocab_size), options.device)


def new_state(config: Any, free: bool, device: torch.device, compile_blocks: bool = False) -> TrainState:
    """As in `free_transformer.training.state`, with weights that are initialized on the GPU."""
    torch.manual_seed(0)
    with device:
        model = FreeTransformer(config) if free else build_baseline(config)
    parallelize(model, Processes(device), compile_blocks=compile_blocks)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return TrainState(model, build_optimizers(model, new_settings()), scaler, None)


def new_settings() -> Settings:
    values = {"training": {"precision": "bf16", "grad_clip": 1.0}, "optimizer": {"name": "adamw"}}
    return Settings.model_validate(values)


def random_rows(documents: str, shape: tuple[int, int], vocabulary: int) -> dict[str, Tensor]:
    """A batch on the CPU, as training reads it: rows of one document, of two, or of two and padding."""
    rows, length = shape
    positions = torch.arange(length).repeat(rows, 1)
    if documents != "whole":
        positions[:, length // 3 :] -= length // 3
    if documents == "packed_and_padded":
        positions[0, -length // 4 :] = -1
    tokens = torch.randint(vocabulary, shape)
    return Rows(tokens.int().numpy(), positions.int().numpy(), text_bytes=0).take(slice(None))


def training_step(state: TrainState, batch: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    """One step as in the training loop, from a batch on the CPU."""
    processes, settings = Processes(device), new_settings().training

    def step() -> None:
        inputs = [with_layout(state.model, batch)]
        shared = agree_on_step(processes, state.model, inputs, 0)
        compute_gradients(state, inputs, shared.tokens, {}, settings, processes, places=shared.places)
        apply_gradients(state)
        for optimizer in state.optimizers:
            optimizer.zero_grad()

    return step


def flops_per_token(model: Any, length: int) -> float:
    """
    FLOPs of a training step per token: 6 per weight of every linear layer, the head included, and attention's matmuls.

    Not counted are lookups (embedding, codebook), norms, and the straight-through gradient, all below 1 %. In the
    encoder keys and values are per token and the rest per plan; its attention is not causal, and all plans share the
    projection of one query.
    """

    def weights(part: nn.Module) -> int:
        return sum(each.weight.numel() for each in part.modules() if isinstance(each, nn.Linear))

    config = model.config
    attention = 2 * 2 * length * config.num_attention_heads * config.head_dim  # of a token that sees `length` others
    total = 6 * weights(model) + 3 * attention / 2 * config.num_hidden_layers
    if isinstance(model, FreeTransformer):
        encoder, plans_per_token = model.encoder, 1 if config.plan_span == 1 else 1 / length
        of_tokens = weights(encoder.attention.k_proj) + weights(encoder.attention.v_proj)
        of_plans = weights(encoder) - of_tokens - weights(encoder.attention.q_proj)
        total += 6 * (of_tokens + plans_per_token * of_plans - weights(encoder)) + 3 * attention * plans_per_token
    return total


def syncs_of_span(span: int | str, options: Any) -> dict[str, Any]:
    """Host synchronizations of a step by the kind of rows, with a small model that is not compiled."""
    shape = (4, 32) if options.small else (4, 512)
    sizes = SMALL if options.small else SYNC_SHAPE
    config = FreeTransformerConfig(**sizes, max_seq_len=shape[1], plan_span=span)
    state = new_state(config, True, options.device)
    found = {}
    for documents in DOCUMENTS:
        step = training_step(state, random_rows(documents, shape, config.vocab_size), options.device)
        step()
        found[documents] = host_syncs(step, options.device)
    return found


if __name__ == "__main__":
    main()
