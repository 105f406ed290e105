"""Texts longer than the model was trained for, in the rows of a server, against `generate`."""

import asyncio

import numpy as np
import pytest
import torch

from conftest import TINY
from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import byte_tokenizer
from free_transformer.deploy import OnnxFreeTransformer
from free_transformer.export.onnx import export_onnx
from free_transformer.model.sampling import Sampling
from free_transformer.serving import engine as engines
from free_transformer.serving.batch import TextRequest
from free_transformer.serving.engine import Engine
from free_transformer.serving.metrics import Metrics
from free_transformer.serving.onnx_batch import OnnxBatch
from free_transformer.serving.torch_batch import TorchBatch

LIMIT = 16
TOKENS = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": None, "pad_token_id": 258}
LENGTHS = [(5, 60), (12, 45), (1, 70), (15, 33), (3, 4)]  # tokens of each prompt, and new ones


def build_model(**changes) -> FreeTransformer:
    torch.manual_seed(0)
    config = FreeTransformerConfig(**{**TINY, **TOKENS, "num_layers": 2, "max_seq_len": LIMIT, **changes})
    model = FreeTransformer(config).eval()
    with torch.no_grad():
        model.plan_table.weight.normal_()
        model.lm_head.weight *= 8  # clear winners, so that rounding cannot choose another token
    return model


@pytest.fixture(params=["torch", "onnx"])
def batch_of(request, tmp_path):
    def build(model: FreeTransformer):
        if request.param == "torch":
            return lambda: TorchBatch(model.double(), byte_tokenizer(), max_rows=3)
        export_onnx(model, tmp_path / "onnx", byte_tokenizer())
        return lambda: OnnxBatch(OnnxFreeTransformer(tmp_path / "onnx"), max_rows=3)

    return build


def write(build, requests) -> list[list[int]]:
    """The tokens of each text."""

    async def run():
        engine = Engine(build, 100, Metrics())
        written: dict[int, list[int]] = {}
        responses = engine.submit(requests)
        for text in responses.texts:
            take, tokens = text.take, written.setdefault(id(text.request), [])
            text.take = lambda token, take=take, tokens=tokens: (tokens.append(token), take(token))[1]
        ends = [piece.end async for piece in responses]
        engine.stop()
        assert ends == ["length"] * len(requests)
        return [written[id(request)] for request in requests]

    return asyncio.run(run())


def requests_of(span, latent_dim=4) -> list[TextRequest]:
    rng, greedy = np.random.default_rng(0), Sampling(temperature=0)
    found = []
    for prompt, new in LENGTHS:
        plans = 1 if span == "sequence" else -(-(prompt + new) // span)
        tokens = [256, *rng.integers(0, 256, prompt - 1).tolist()]
        found.append(TextRequest(tokens, new, greedy, plan=rng.random((plans, latent_dim)) < 0.5))
    return found


@pytest.mark.parametrize(
    ("batch_of", "span"),
    [
        *(("torch", span) for span in (4, 8, "sequence")),
        ("onnx", "sequence"),
        *(pytest.param("onnx", span, marks=pytest.mark.slow) for span in (4, 8)),  # each exports a model
    ],
    indirect=["batch_of"],
)
def test_rows_are_read_again_as_by_generate(batch_of, span, monkeypatch):
    model, requests = build_model(plan_span=span), requests_of(span)
    if span == "sequence":
        requests[1].plan_changes = {9: np.ones((1, 4), dtype=bool), 21: np.zeros((1, 4), dtype=bool)}
    build = batch_of(model)
    written = write(build, requests)
    monkeypatch.setattr(engines, "PROMPT_TOKENS_PER_STEP", 1)  # one text is read at a time, the others wait
    assert write(build, requests) == written
    for request, tokens in zip(requests, written, strict=True):
        changes = {start: torch.from_numpy(plan) for start, plan in request.plan_changes.items()}
        expected = model.generate(
            torch.tensor([request.tokens]),
            plan=torch.from_numpy(request.plan),
            plan_changes=changes,
            max_new_tokens=request.max_tokens,
            do_sample=False,
        )
        assert expected[0, len(request.tokens) :].tolist() == tokens


def test_seeded_text_depends_on_its_request_alone():
    model = build_model(plan_span=4)
    requests = [TextRequest([256, *b"abc"[:length]], 50, seed=(5, length)) for length in range(4)]
    build = lambda: TorchBatch(model, byte_tokenizer(), max_rows=3)  # noqa: E731
    together = write(build, requests)
    assert together == [write(build, [request])[0] for request in requests]
    longer = TextRequest(requests[1].tokens, 90, seed=requests[1].seed)
    assert write(build, [longer])[0][:50] == together[1]


def test_memory_does_not_grow_with_the_text():
    model = build_model(plan_span=1)
    batch = TorchBatch(model, byte_tokenizer(), max_rows=2)
    batch.add(TextRequest([256], 500, Sampling(temperature=0)))
    for _ in range(300):
        if batch.contexts[0].is_due:
            assert batch.read_again(0) < LIMIT
        batch.step([65])
        assert len(batch.contexts[0].tokens) <= LIMIT
    assert batch.cache.keys[0].shape[2] <= 64 and batch.plan.shape[1] == LIMIT
