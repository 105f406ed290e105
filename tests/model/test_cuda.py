"""
The library on a GPU: attention kernels, precision, compilation, training, checkpoints, generation and serving.

Every result is compared with plain operations, with the CPU, or with the same computation done another way. The module
is skipped without a GPU. `FREE_TRANSFORMER_TEST_DEVICE=cpu` runs all tests that need no kernel of a GPU on the CPU.
"""

import contextlib
import copy
import functools
import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from free_transformer import FreeTransformer, FreeTransformerConfig, build_baseline
from free_transformer.data import Rows, byte_tokenizer
from free_transformer.distributed.parallelize import shard, whole_state_dict
from free_transformer.distributed.processes import MESH, Processes
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.model import attention, encoder
from free_transformer.model.layout import num_plans
from free_transformer.model.plan import BinaryMapper, PlanTable
from free_transformer.settings import Settings, TrainingSettings, parse_settings
from free_transformer.training import Run, loop, train
from free_transformer.training.batch_size import memory_budget, peak_bytes, reset_peak
from free_transformer.training.checkpoint import Checkpoints, TrainState, load_checkpoint
from free_transformer.training.optimizers import build_optimizers
from free_transformer.training.state import new_state
from free_transformer.training.step import agree_on_step, apply_gradients, compute_gradients, with_layout

DEVICE = os.environ.get("FREE_TRANSFORMER_TEST_DEVICE") or "cuda"
GPU = DEVICE == "cuda" and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not GPU, reason="there is no GPU")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs kernels of a GPU")

SPANS = [1, 3, "sequence"]
ROWS = ["whole", "left", "right", "packed", "packed and padded"]
LENGTH = 48
# Heads of 64, which every kernel takes; two of them share keys and values.
WIDE = {"hidden_dim": 128, "num_heads": 2, "num_kv_heads": 1, "ffn_hidden_dim": 256, "max_seq_len": 256}
# Relative errors against fp32 or float64: of logits and losses, and of gradients.
CLOSE = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-4)}
CLOSE |= {torch.bfloat16: (3e-2, 6e-2), torch.float16: (5e-3, 1e-2)}
WATCHED = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "encoder.attention.v_proj.weight"]
WATCHED += ["model.layers.2.self_attn.k_proj.weight", "encoder.readout.weight", "plan_table.weight"]


@pytest.fixture
def same_plans(monkeypatch):
    """Plans that do not depend on their logits, so that results that differ by rounding have the same plans."""

    def forward(self: BinaryMapper, plan_logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        number = torch.arange(plan_logits.numel(), device=plan_logits.device).view(plan_logits.shape)
        return (number * 2654435761 >> 13) % 2 == 0

    monkeypatch.setattr(BinaryMapper, "forward", forward)


def inputs_of(rows: str) -> dict[str, Tensor]:
    """Two rows of tokens on the CPU, and the mask and positions of padded or packed rows."""
    inputs = {"input_ids": torch.randint(3, 32, (2, LENGTH), generator=torch.Generator().manual_seed(1))}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if rows == "left":
        mask[0, :20] = 0
    elif rows == "right":
        mask[0, 30:] = 0
    elif rows != "whole":
        inputs["position_ids"] = torch.stack([torch.arange(LENGTH) % 16, (torch.arange(LENGTH) + 17) % LENGTH])
        inputs["position_ids"][1] -= inputs["position_ids"][1].where(torch.arange(LENGTH) < 31, 0).min()
    if rows == "packed and padded":
        mask[0, 40:] = 0
        inputs["position_ids"][0, 40:] = 0
    return inputs if rows == "whole" else {**inputs, "attention_mask": mask}


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The tokens, without padding and what only padding precedes."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"] if mask is None else inputs["input_ids"].masked_fill(mask * mask.cumsum(1) <= 1, -100)


def moved(inputs: dict[str, Any], device: Any = DEVICE) -> dict[str, Any]:
    return {name: value.to(torch.device(device)) for name, value in inputs.items()}


def results_of(model: nn.Module, inputs: dict[str, Tensor], watched: list[str] | None = None) -> dict[str, Tensor]:
    """Loss, logits of real tokens and of used plans, and gradients, on the CPU in float64."""
    device = next(model.parameters()).device
    out = model(**moved({**inputs, "labels": labels_of(inputs)}, device), mode="training")
    parameters = dict(model.named_parameters())
    names = list(parameters) if watched is None else watched
    gradients = torch.autograd.grad(out.loss, [parameters[name] for name in names])
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool().to(device)
    found = {"loss": out.loss, "logits": out.logits[real], "plan_logits": out.plan_logits[out.plan_mask]}
    found |= dict(zip(names, gradients, strict=True))
    return {name: value.detach().cpu().double() for name, value in found.items()}


def assert_same_results(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in expected.items():
        of_values, of_gradients = CLOSE[dtype]
        tolerance = of_values if name in ("loss", "logits", "plan_logits") else of_gradients
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}, at most {tolerance:.0e} allowed"


def rotate_in_double(model: FreeTransformer) -> FreeTransformer:
    """Computes the angles of rotary positions in float64, where Llama's are in single precision."""

    def forward(embedding: nn.Module, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * embedding.inv_freq.double()).repeat(1, 1, 2)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    for embedding in (model.model.rotary_emb, model.encoder.rotary_emb):
        embedding.forward = functools.partial(forward, embedding)
    return model


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gpu_matches_cpu(tiny_model, same_plans, dtype, span, rows):
    """All results and gradients, in float64 by plain operations and in fp32 by the default attention."""
    model, inputs = rotate_in_double(tiny_model(dtype, plan_span=span, **WIDE)), inputs_of(rows)
    model.set_attn_implementation("eager" if dtype == torch.float64 else "sdpa")
    expected = results_of(model, inputs)
    assert_same_results(results_of(model.to(DEVICE), inputs), expected, dtype)


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
COMBINATIONS = [
    *(("any", dtype, rows) for dtype in (torch.float32, torch.bfloat16, torch.float16) for rows in ROWS),
    *(("flash", torch.bfloat16, rows) for rows in ("whole", "packed", "packed and padded")),  # takes no mask
    *(("efficient", dtype, rows) for dtype in (torch.float32, torch.bfloat16) for rows in ROWS),
    *(("math", torch.bfloat16, rows) for rows in ROWS),
    ("cudnn", torch.bfloat16, "whole"),
]


@pytest.mark.parametrize(("kernel", "dtype", "rows"), COMBINATIONS)
@pytest.mark.parametrize("span", SPANS)
def test_sdpa_kernel_matches_eager_attention(tiny_model, same_plans, monkeypatch, span, kernel, dtype, rows):
    """Each kernel against plain operations in fp32. `any` is PyTorch's choice, and documents by their boundaries."""
    if not GPU and kernel != "any":
        pytest.skip("needs kernels of a GPU")
    shared = {} if kernel in ("any", "math", "flash") else {"num_kv_heads": 2}  # the others share no keys and values
    model, inputs = tiny_model(dtype, plan_span=span, **WIDE, **shared).to(DEVICE), inputs_of(rows)
    reference = tiny_model(torch.float32, plan_span=span, **WIDE, **shared).to(DEVICE)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("eager")
    expected = results_of(reference, inputs, WATCHED)
    if kernel == "any":
        assert_same_results(results_of(model, inputs, WATCHED), expected, dtype)
        return
    if kernel != "flash":  # a mask separates the documents of packed rows then
        for module in (attention, encoder):
            monkeypatch.setattr(module, "has_varlen_kernel", lambda config, states: False)
    try:
        with sdpa_kernel(KERNELS[kernel]):
            found = results_of(model, inputs, WATCHED)
    except RuntimeError as error:
        if kernel != "cudnn":
            raise
        pytest.skip(str(error))
    assert_same_results(found, expected, dtype)


@needs_gpu
@pytest.mark.parametrize("rows", ROWS[1:])
@pytest.mark.parametrize("span", SPANS)
def test_training_step_attends_by_boundaries(tiny_model, same_plans, monkeypatch, span, rows):
    """A batch with a layout under autocast goes to the variable-length kernel in every layer, padding included."""
    model, inputs = tiny_model(torch.float32, plan_span=span, **WIDE).to(DEVICE), inputs_of(rows)
    expected = results_of(model, inputs, WATCHED)
    calls, original = [], attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: calls.append(1) or original(*a, **k))
    given = moved(with_layout(model, {**inputs, "labels": labels_of(inputs)}))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = model(**given, mode="training")
    assert len(calls) == 5  # four layers and the encoder
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(out.loss, [parameters[name] for name in WATCHED])
    found = {
        "loss": out.loss,
        "plan_logits": out.plan_logits[out.plan_mask],
        **dict(zip(WATCHED, gradients, strict=True)),
    }
    found = {name: value.detach().cpu().double() for name, value in found.items()}
    assert_same_results(found, {name: expected[name] for name in found}, torch.bfloat16)


BACKENDS = [
    *(("flex_attention", *case) for case in [(1, "whole", False), ("sequence", "left", False), (3, "packed", True)]),
    *((f"flash_attention_{version}", span, rows, True) for version in (2, 3) for span in SPANS for rows in ROWS),
]


@needs_gpu
@pytest.mark.parametrize(("backend", "span", "rows", "backward"), BACKENDS)
def test_attention_backend_matches_eager_attention(tiny_model, same_plans, backend, span, rows, backward):
    """Flex Attention is compiled anew for each case, so it has few of them and one backward pass."""
    model, inputs = tiny_model(torch.bfloat16, plan_span=span, **WIDE).to(DEVICE), inputs_of(rows)
    reference = tiny_model(torch.float32, plan_span=span, **WIDE).to(DEVICE)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("eager")
    try:
        model.set_attn_implementation(backend)
    except ImportError as missing:
        pytest.skip(str(missing))
    if backward:
        assert_same_results(results_of(model, inputs, WATCHED), results_of(reference, inputs, WATCHED), torch.bfloat16)
        return
    found = []
    with torch.no_grad():
        for each in (model, reference):
            out = each(**moved(inputs), mode="training")
            real = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool().to(DEVICE)
            values = {"logits": out.logits[real], "plan_logits": out.plan_logits[out.plan_mask]}
            found.append({name: value.double().cpu() for name, value in values.items()})
    assert_same_results(*found, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_half_precision_is_finite(tiny_model, dtype, rows):
    found = results_of(tiny_model(dtype, plan_span=3, **WIDE).to(DEVICE).train(), inputs_of(rows))
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("chunk_bytes", [2000, 2**20])
@pytest.mark.parametrize("groups", [[6], [4, 2], [1] * 6])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_straight_through_gradient_matches_cpu(dtype, gradient, groups, chunk_bytes):
    logits, plan = torch.randn(3, 9, 6).double(), torch.rand(3, 9, 6) < 0.5
    grad = torch.randn(3, 9, 16).double()
    original = PlanTable(groups, 16, gradient, chunk_bytes, "normal").double()
    found = []
    for kind, device in ((torch.float64, "cpu"), (dtype, DEVICE)):
        table = copy.deepcopy(original).to(device, kind)
        source = logits.clone().to(device, kind).requires_grad_()
        table(plan.to(device), source).backward(grad.to(device, kind))
        found.append((source.grad.cpu().double(), table.weight.grad.cpu().double()))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)


@needs_gpu
@pytest.mark.parametrize("rows", ["whole", "packed and padded"])
def test_compiled_model_is_one_graph_with_the_same_results(tiny_model, same_plans, rows):
    model = tiny_model(torch.float32, plan_span=3, num_layers=2, **WIDE).to(DEVICE)
    inputs = inputs_of(rows)
    given = moved(with_layout(model, {**inputs, "labels": labels_of(inputs)}))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for called in (torch.compile(model, fullgraph=True), model):
        loss = called(**given, mode="training", num_items_in_batch=80).loss
        gradients = torch.autograd.grad(loss, parameters)
        values = {"loss": loss, **dict(zip(names, gradients, strict=True))}
        found.append({name: value.detach().double().cpu() for name, value in values.items()})
    assert_same_results(*found, torch.float32)


@pytest.fixture
def tiny_settings(tmp_path):
    """Settings of a run of seconds on the device: `tiny_settings("name", training={...}, model={...})`."""
    sentences = ["The quick brown fox jumps over the lazy dog. ", "Pack my box with five dozen liquor jugs! "]
    (tmp_path / "text.txt").write_text("".join(sentences[i % 2] for i in range(40)))
    short = [{"text": sentences[i % 2][: 6 + i]} for i in range(30)]  # packed and padded
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(each) + "\n" for each in short))
    training = {"max_steps": 6, "batch_size": 4, "seq_len": 32, "warmup_steps": 2, "log_every": 1, "eval_every": 3}
    training |= {"learning_rate": 3e-3, "save_every": 2, "device": DEVICE, "prior_rows": 8, "precision": "fp32"}
    model = {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "latent_dim": 3, "plan_span": 5, "free_bits": 0.25}

    def build(name: str = "run", text: str = "text.txt", **sections: Any) -> Settings:
        return parse_settings(
            {
                "run_dir": str(tmp_path / name),
                "model": {**model, **sections.get("model", {})},
                "training": {**training, **sections.get("training", {})},
                "logging": {"tensorboard": False, "sample_every": 3, "sample_tokens": 4},
                "data": {"train": [str(tmp_path / text)], "validation": [str(tmp_path / "text.txt")]},
            }
        )

    return build


def logged(run: Run, name: str = "loss") -> list[float]:
    return [line[name] for line in run.read_metrics() if line["split"] == "train"]


def train_until(monkeypatch: pytest.MonkeyPatch, step: int, settings: Settings) -> None:
    """A run that is interrupted, as by Ctrl-C, after so many steps."""
    original = loop._Trainer._optimizer_step

    def interrupted(self: Any, *arguments: Any) -> int:
        if self.state.step == step:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Trainer, "_optimizer_step", interrupted)
        train(settings, quiet=True)


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        ("fp32", "text.txt"),
        *((precision, text) for precision in ("bf16", "fp16") for text in ("text.txt", "short.jsonl")),
    ],
)
def test_run_learns_in_each_precision(tiny_settings, precision, text):
    if precision == "fp16" and not GPU:
        pytest.skip("fp16 trains on GPUs only")
    run = train(tiny_settings(text=text, training={"precision": precision, "max_steps": 30}), quiet=True)
    losses = logged(run)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    if precision == "fp16":
        assert min(logged(run, "loss_scale")) >= 1


@pytest.mark.parametrize(
    ("how", "precision", "text"),
    [
        ("gradient_checkpointing", "bf16", "short.jsonl"),
        pytest.param("compile", "fp32", "text.txt", marks=needs_gpu),
        pytest.param("compile", "bf16", "short.jsonl", marks=needs_gpu),
    ],
)
def test_compiled_or_recomputed_blocks_train_as_plain_ones(tiny_settings, same_plans, how, precision, text):
    runs = [
        train(tiny_settings(str(on), text, training={how: on, "precision": precision, "max_steps": 3}), quiet=True)
        for on in (False, True)
    ]
    close = {"fp32": 1e-4, "bf16": 1e-2}[precision]
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), rel=close)


@pytest.fixture
def deterministic(monkeypatch):
    """Operations that give the same result each time, where PyTorch has such ones; it warns of the others."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("text", ["text.txt", "short.jsonl"])
def test_resumed_run_is_the_uninterrupted_one(tiny_settings, deterministic, monkeypatch, recwarn, text, precision):
    """
    Bit-for-bit with deterministic operations, random plans included. Where a GPU has none, weights are within 1e-5:
    the order of atomic additions is not fixed.
    """
    training = {"precision": precision}
    whole = train(tiny_settings("whole", text, training=training), quiet=True)
    train_until(monkeypatch, 5, tiny_settings("parts", text, training=training))  # the last checkpoint is of step 4
    parts = train(tiny_settings("parts", text, training=training), quiet=True)
    guaranteed = not any("deterministic" in str(warning.message) for warning in recwarn)
    close = {"atol": 0, "rtol": 0} if guaranteed else {"atol": 1e-5, "rtol": 1e-5}
    assert [line["step"] for line in parts.read_metrics()] == [line["step"] for line in whole.read_metrics()]
    assert logged(parts) == pytest.approx(logged(whole), abs=close["atol"], rel=close["rtol"])
    ours, theirs = whole.load_model().state_dict(), parts.load_model().state_dict()
    for name, value in ours.items():
        assert_close(theirs[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("text", ["text.txt", "short.jsonl"])
def test_run_moves_between_gpu_and_cpu(tiny_settings, same_plans, monkeypatch, text):
    """Two steps on a GPU, two on a CPU, two on a GPU. Random plans differ by device, so they are fixed here."""
    whole = train(tiny_settings("whole", text), quiet=True)
    train_until(monkeypatch, 2, tiny_settings("parts", text))
    train_until(monkeypatch, 4, tiny_settings("parts", text, training={"device": "cpu"}))
    parts = train(tiny_settings("parts", text), quiet=True)
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-4)
    expected = 0 if DEVICE == "cpu" else 2
    history = [json.loads(line) for line in (parts.path / "history.jsonl").read_text().splitlines()]
    assert sum("training.device" in each["changes"] for each in history) == expected


def test_model_saved_from_gpu_loads_on_cpu(tiny_model, tokens_like, tmp_path):
    model, tokens = tiny_model(torch.float32, plan_span=3).to(DEVICE), tokens_like(2, 9)
    plan = model.sample_plan(2, 3)
    model.gather_prior([{"input_ids": tokens}])
    model.save_pretrained(tmp_path)
    loaded = FreeTransformer.from_pretrained(tmp_path)
    assert loaded.device.type == "cpu"
    assert all(torch.equal(value, model.state_dict()[name].cpu()) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        found = model(tokens.to(DEVICE), plan=plan).logits.cpu()
        assert_close(loaded(tokens, plan=plan.cpu()).logits, found, atol=1e-4, rtol=1e-4)


def test_automatic_batch_size_fits(tiny_settings):
    device = torch.device(DEVICE)
    budget = memory_budget(Processes(device))
    assert budget > 0
    reset_peak(device)
    run = train(tiny_settings(training={"batch_size": "auto", "max_steps": 2}), quiet=True)
    assert run.settings.training.batch_size >= 1
    assert np.isfinite(logged(run)).all() and len(logged(run)) == 2
    assert peak_bytes(device) <= budget


def take_step(state: TrainState, batch: dict[str, Tensor], training: TrainingSettings, processes: Processes) -> Tensor:
    """An optimizer step as in the training loop, and its loss. Only here do tests call the parts of a step."""
    inputs = [with_layout(state.model, batch)]
    shared = agree_on_step(processes, state.model, inputs, 0)
    weights = {name: torch.full((), 1.0, device=processes.device) for name in ("kl_weight", "free_bits")}
    totals = compute_gradients(state, inputs, shared.tokens, weights, training, processes, places=shared.places)
    apply_gradients(state)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    return totals.loss[0]


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Raises an error where the CPU waits for the GPU."""
    if not GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


STEPS = {
    "plan per token": {"plan_span": 1},
    "aggregate": {"plan_span": "sequence", "free_bits": 2.0, "min_bits": 1.0, "aggregate_weight": 1.0},
    "16 bits, exact": {"plan_span": 4, "latent_dim": 16, "plan_gradient": "exact"},
    "16 bits, sampled": {"plan_span": 4, "latent_dim": 16, "plan_gradient": "sampled"},
    "groups, sampled": {"plan_span": 4, "latent_dim": 16, "code_bits": 8, "plan_gradient": "sampled"},
}


@pytest.mark.parametrize("model", STEPS)
@pytest.mark.parametrize("rows", ["whole", "packed and padded"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_step_does_not_wait_for_the_gpu(tiny_settings, rows, model, optimizer):
    settings = tiny_settings(model=STEPS[model], training={"precision": "bf16", "optimizer": optimizer})
    processes = Processes(torch.device(DEVICE))
    state = new_state(settings, byte_tokenizer(), processes)
    assert state.model.plan_table.sparse == (len(state.model.plan_table.weight) == 2**16)
    positions = np.stack([np.arange(LENGTH)] * 2)
    if rows != "whole":
        positions = np.stack([np.arange(LENGTH) % 16, np.r_[np.arange(31), np.arange(LENGTH - 31)]])
        positions[0, 40:] = -1
    tokens = np.random.default_rng(0).integers(3, 250, positions.shape)
    batch = Rows(tokens.astype(np.int32), positions.astype(np.int32), 0).take(slice(None))
    assert ("position_ids" in batch) == (rows != "whole")
    take_step(state, batch, settings.training, processes)  # creates the optimizer's state
    with no_synchronization():
        loss = take_step(state, batch, settings.training, processes)
    assert loss.isfinite()


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """Only this process as a group, by NCCL on a GPU, and its mesh."""
    backend, device = ("cpu:gloo,cuda:nccl", torch.device("cuda", 0)) if GPU else ("gloo", torch.device("cpu"))
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh(device.type, (1, 1, 1), mesh_dim_names=MESH)
        yield Processes(device, mesh=mesh, data_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_sharded_model_of_one_process_trains_as_the_whole_one(tiny_config, tokens_like, same_plans, tmp_path):
    """Steps, evaluation, weights and checkpoints of `fully_shard` over one process, by NCCL on a GPU."""
    tokens = tokens_like(4, 16)
    settings = Settings.model_validate({"training": {"precision": "fp32", "learning_rate": 1e-2, "optimizer": "adamw"}})
    training = settings.training
    batch = {"input_ids": tokens, "labels": tokens}

    def new(processes: Processes, sharded: bool) -> TrainState:
        torch.manual_seed(0)
        model = FreeTransformer(tiny_config(plan_span=3)).to(processes.device)
        if sharded:
            shard(model, processes)
        return TrainState(model, build_optimizers(model, settings, sparse_tables=False))

    def results(state: TrainState, processes: Processes) -> list[float]:
        losses = [float(take_step(state, batch, training, processes)) for _ in range(3)]
        torch.manual_seed(1)
        return [*losses, evaluate_likelihood(state.model, [{"input_ids": tokens}], 2).nll]

    alone = Processes(torch.device(DEVICE))
    whole = new(alone, sharded=False)
    expected = results(whole, alone)
    with process_group() as processes:
        state = new(processes, sharded=True)
        assert results(state, processes) == pytest.approx(expected, rel=1e-5)
        weights = {name: value.clone() for name, value in whole_state_dict(state.model).items()}
        for name, value in whole.model.named_parameters():
            assert_close(weights[name], value.detach().cpu(), atol=1e-5, rtol=1e-5)
        path = Checkpoints(tmp_path, 1, processes).save(state)
        other = new(processes, sharded=True)
        load_checkpoint(path, other, processes)
        assert all(torch.equal(value, weights[name]) for name, value in whole_state_dict(other.model).items())
        following = [float(take_step(each, batch, training, processes)) for each in (state, other)]
        assert following[0] == pytest.approx(following[1], rel=1e-6)
    load_checkpoint(path, whole, alone)
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in whole.model.named_parameters())


def prompt_of(padded: bool) -> dict[str, Tensor]:
    prompt, mask = torch.randint(3, 32, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    return moved({"input_ids": prompt, "attention_mask": mask})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("span", SPANS)
def test_static_cache_generates_what_a_dynamic_one_does(tiny_model, span, padded):
    """Greedy and sampled text, and its plans, from the same seed."""
    model, inputs = tiny_model(torch.float32, plan_span=span, **WIDE).to(DEVICE), prompt_of(padded)
    for sampled in (False, True):
        found = []
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
            torch.manual_seed(3)
            options = {"max_new_tokens": 12, "do_sample": sampled, "return_dict_in_generate": True}
            found.append(model.generate(**inputs, **options, **cache))
        assert found[0].sequences.shape == (2, 20)
        assert torch.equal(found[0].plan, found[1].plan)
        assert torch.equal(found[0].sequences, found[1].sequences)


@needs_gpu
@pytest.mark.parametrize(("span", "padded"), [(1, True), ("sequence", False)])
def test_generation_by_cuda_graphs_matches_plain_generation(tiny_model, span, padded):
    """`generate` compiles the model with a static cache on a GPU, and replays it as a graph."""
    model = tiny_model(torch.float32, plan_span=span, num_layers=2, **WIDE).to(DEVICE)
    inputs, found = prompt_of(padded), []
    for cache in ({}, {"cache_implementation": "static"}):
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.manual_seed(3)
        options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(**inputs, **options, **cache)
        found.append((out.sequences, out.plan))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled) == bool(cache)
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("rows", ["whole", "packed and padded"])
def test_likelihood_matches_cpu(tiny_model, rows):
    model, batches = tiny_model(torch.float32, plan_span="sequence", **WIDE), [inputs_of(rows)]
    expected = evaluate_likelihood(model, batches, method="exact")
    found = evaluate_likelihood(model.to(DEVICE), batches, method="exact")
    assert found.nll == pytest.approx(expected.nll, abs=1e-4)
    assert found.kl == pytest.approx(expected.kl, abs=1e-4)
    assert (found.tokens, found.documents) == (expected.tokens, expected.documents)
    baseline = build_baseline(model.config).float().eval()
    expected = evaluate_likelihood(baseline, batches).nll
    assert evaluate_likelihood(baseline.to(DEVICE), batches).nll == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rows", ["whole", "packed and padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_particle_filter_is_near_the_exact_likelihood(tiny_model, dtype, rows):
    """One plan of 4 bits per document: many particles come close to the sum over all plans."""
    model, batches = tiny_model(torch.float32, plan_span="sequence", **WIDE), [inputs_of(rows)]
    exact = evaluate_likelihood(model, batches, method="exact").nll
    found = evaluate_likelihood(model.to(DEVICE, dtype), batches, 256, method="particle_filter").nll
    assert found == pytest.approx(exact, abs=0.03)


def test_int8_weights_are_nearly_the_model(tiny_model, tmp_path):
    pytest.importorskip("torchao")
    from free_transformer.export.quantize import load_quantized, quantize

    model = tiny_model(torch.float32, plan_span=3, **WIDE)
    inputs, plan = inputs_of("left"), model.sample_plan(2, num_plans(3, LENGTH))
    quantize(model, "int8-weight", tmp_path / "quantized")
    loaded = load_quantized(tmp_path / "quantized")
    with torch.no_grad():
        expected = model(**inputs, plan=plan).logits
        of_cpu = loaded(**inputs, plan=plan).logits
        found = loaded.to(DEVICE)(**moved(inputs), plan=plan.to(DEVICE)).logits.cpu()
    real = inputs["attention_mask"].bool()
    assert_close(found[real], of_cpu[real], atol=1e-3, rtol=1e-3)
    assert 0 < (found - expected)[real].abs().max() < 0.2 * expected.std()


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of an application that uvicorn serves from a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    from free_transformer.serving.app import listen

    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("span", ["sequence", 4])
def test_server_generates_on_the_gpu(span):
    """Greedy text is that of `generate`; sampled text of a seed does not depend on other requests."""
    pytest.importorskip("fastapi")
    from free_transformer.serving.app import create_app
    from free_transformer.serving.torch_batch import TorchBatch

    sizes = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "latent_dim": 4}
    model = FreeTransformer(FreeTransformerConfig(**{**WIDE, **sizes}, num_layers=2, plan_span=span)).eval().to(DEVICE)
    batch, tokenizer, rows = TorchBatch(model, byte_tokenizer(), max_rows=4), byte_tokenizer(), []
    step = batch.step
    batch.step = lambda tokens: rows.append(batch.rows) or step(tokens)

    def ask(address: str, **body: Any) -> list[str]:
        content = json.dumps({"model": "tiny", "max_tokens": 8, **body}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", content, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [choice["text"] for choice in json.load(answer)["choices"]]

    plan = {"plan": "0110" if span == "sequence" else "0110" * 3}
    greedy, sampled = {"prompt": ["ab", "xyz"], "temperature": 0, **plan}, {"prompt": "ab", "seed": 5, **plan}
    with running(create_app(lambda: batch, "tiny")) as address:
        texts = ask(address, **greedy)
        assert max(rows) == 2  # both prompts in one batch
        alone = ask(address, **sampled)
        answers: list[Any] = [None] * 4
        bodies = [greedy, sampled, {**sampled, "seed": 6}, {**sampled, "prompt": "c"}]

        def answer(index: int) -> None:
            answers[index] = ask(address, **bodies[index])

        threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers[:2] == [texts, alone]
    for prompt, text in zip(greedy["prompt"], texts, strict=True):
        tokens = torch.tensor([[256, *prompt.encode()]], device=DEVICE)
        written = model.generate(tokens, **plan, max_new_tokens=8, do_sample=False)
        assert text == tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
