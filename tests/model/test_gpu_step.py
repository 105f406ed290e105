"""The step of a training loop on a GPU, as far as a CPU can show it: no value is read back, documents need no mask."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close

from free_transformer import FreeTransformer
from free_transformer.data import Rows
from free_transformer.distributed.processes import Processes
from free_transformer.model import attention, encoder, masks
from free_transformer.model.layout import Boundaries, batch_layout
from free_transformer.settings import Settings
from free_transformer.training.checkpoint import TrainState
from free_transformer.training.optimizers import build_optimizers
from free_transformer.training.step import apply_gradients, compute_gradients, with_layout

LENGTH = 12
POSITIONS = {
    "whole": [range(12), range(12), range(12)],
    "packed": [[0, 1, 2, 3, *range(8)], [*range(5), *range(7)], range(12)],
    "padded": [range(12), [*range(7), *[-1] * 5], [0, *[-1] * 11]],
    "packed and padded": [[0, 1, 2, 3, *range(8)], [*range(7), 0, 1, -1, -1, -1], range(12)],
}
SPANS = [1, 3, "sequence"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # of rotary positions, which are computed in fp32


def rows_of(kind: str) -> Rows:
    tokens = np.random.default_rng(0).integers(3, 32, (3, LENGTH)).astype(np.int32)
    return Rows(tokens, np.array([list(row) for row in POSITIONS[kind]], dtype=np.int32), 0)


def fake(mode: FakeTensorMode, value: Any) -> Any:
    """The value without its numbers."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if dataclasses.is_dataclass(value):
        parts = {each.name: fake(mode, getattr(value, each.name)) for each in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def step_without_numbers(config: Any, inputs: dict[str, Any], steps: int = 2) -> None:
    """Training steps on tensors that have no values: reading one raises an error."""
    with torch.device("meta"):
        net = FreeTransformer(config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = {name: fake(mode, value) for name, value in inputs.items()}
    settings = Settings.model_validate({"optimizer": {"name": "adamw", "codebook": "adamw"}})
    with mode:
        net.to_empty(device="cpu").train()
        state = TrainState(net, build_optimizers(net, settings), torch.amp.GradScaler("cpu", enabled=False), None)
        for _ in range(steps):
            compute_gradients(state, [inputs], 30, {}, settings.training, Processes(torch.device("cpu")))
            apply_gradients(state)
            for optimizer in state.optimizers:
                optimizer.zero_grad()


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"plan_span": 1},
        {"plan_span": 3, "latent_dim": 13},
        {"plan_span": "sequence", "free_bits": 2.0, "min_bits": 1.0, "aggregate_weight": 1.0},
    ],
)
def test_a_training_step_reads_no_value(tiny_config, kind, changes):
    config = tiny_config(**changes)
    with torch.device("meta"):
        net = FreeTransformer(config)
    step_without_numbers(config, with_layout(net, rows_of(kind).take(slice(None))))


def test_what_reads_a_value_is_noticed(tiny_config):
    config = tiny_config(plan_span=3)
    with pytest.raises(DataDependentOutputException):
        FreeTransformer(config)(**_fake_batch("packed"), mode="training")


def _fake_batch(kind: str) -> dict[str, Any]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return {name: fake(mode, value) for name, value in rows_of(kind).take(slice(None)).items()}


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("span", SPANS)
def test_a_layout_stands_for_mask_and_positions(tiny_model, span, kind):
    net, batch = tiny_model(plan_span=span).train(), rows_of(kind).take(slice(None))
    found = []
    for inputs in (batch, with_layout(net, batch)):
        torch.manual_seed(0)
        out = net(**inputs, mode="training", num_items_in_batch=30)
        net.zero_grad()
        out.loss.backward()
        gradients = {name: each.grad for name, each in net.named_parameters() if each.grad is not None}
        found.append((out.loss, out.kl, out.plan_logits[out.plan_mask], gradients))
    assert_close(*found, **CLOSE)


def test_a_layout_that_does_not_fit_is_refused(tiny_model, tokens_like):
    net, tokens = tiny_model(), tokens_like(2, 8)
    layout = batch_layout(1, (2, 8), torch.ones(2, 8), None)
    with pytest.raises(ValueError, match=r"layout of \(2, 8\) tokens for a batch of \(2, 6\)"):
        net(tokens[:, :6], mode="training", layout=layout)
    with pytest.raises(ValueError, match="layout replaces attention_mask"):
        net(tokens, attention_mask=torch.ones(2, 8), mode="training", layout=layout)


def test_boundaries_of_documents_and_of_their_plans():
    batch = rows_of("packed and padded").take(slice(None))
    found = batch_layout(3, (3, LENGTH), batch["attention_mask"], batch["position_ids"]).boundaries
    assert isinstance(found, Boundaries)
    # tokens of each document: row 0 has 4 and 8, row 1 has 7, 2 and 3 of padding, row 2 has 12
    assert found.tokens.tolist() == [0, 4, 12, 19, 21, 24, 36]
    # plans of 3 tokens: 2 and 3; 3 and 1, and the row's fifth, which is unused; 4, and an unused one
    assert found.plans.tolist() == [0, 2, 5, 8, 10, 10, 15]


def test_no_boundaries_where_padding_divides_a_document():
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    assert batch_layout(1, (2, 4), mask, None).boundaries is None
    assert batch_layout(1, (2, 4), torch.ones(2, 4), None).boundaries is None


def varlen_reference(query: Tensor, key: Tensor, value: Tensor, *ends: Any, window_size: tuple, **_: Any) -> Tensor:
    """PyTorch's `varlen_attn` document by document, (T, heads, head_dim)."""
    of_queries, of_keys = (each.tolist() for each in ends[:2])
    parts = []
    for document in range(len(of_keys) - 1):
        own = slice(of_queries[document], of_queries[document + 1])
        read = slice(of_keys[document], of_keys[document + 1])
        if own.start == own.stop:
            continue
        inputs = (each.transpose(0, 1)[None] for each in (query[own], key[read], value[read]))
        causal = window_size == (-1, 0)
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["packed", "padded", "packed and padded"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("given", ["layout", "mask"])
def test_attention_by_boundaries_equals_attention_by_mask(tiny_model, span, kind, given, monkeypatch):
    net, batch = tiny_model(plan_span=span), rows_of(kind).take(slice(None))
    inputs = with_layout(net, batch) if given == "layout" else batch

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        out = net(**inputs, mode="training")
        return out.loss, out.plan_logits[out.plan_mask]

    expected, calls = run(), []

    def varlen(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return varlen_reference(*args, **kwargs)

    for module in (masks, encoder):
        monkeypatch.setattr(module, "takes_boundaries", lambda config, states: True)
    monkeypatch.setattr(encoder, "has_varlen_kernel", lambda config, states: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    assert_close(run(), expected, **CLOSE)
    assert len(calls) == (0 if kind == "padded" and given == "mask" else 5)


@pytest.mark.parametrize("kind", ["whole", "packed and padded"])
def test_a_model_compiles_to_one_graph_with_a_layout(tiny_model, kind):
    net = tiny_model(torch.float32, plan_span=3)
    inputs = with_layout(net, rows_of(kind).take(slice(None)))

    def run(called: Any) -> Tensor:
        torch.manual_seed(0)
        return called(**inputs, mode="training", num_items_in_batch=30).loss

    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled), run(net), **CLOSE)
