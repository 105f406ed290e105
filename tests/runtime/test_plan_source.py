"""The rule for where plans come from: in NumPy as in torch, wherever no random number decides."""

from itertools import product

import numpy as np
import pytest
import torch

from conftest import TINY
from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import byte_tokenizer
from free_transformer.deploy import OnnxFreeTransformer
from free_transformer.export.onnx import export_onnx
from free_transformer.model.layout import num_plans as torch_num_plans
from free_transformer.runtime.plan_source import (
    PlanSource,
    given_plan,
    num_plans,
    num_plans_to_read,
    sample_posterior,
    sample_prior,
)
from free_transformer.serving.batch import StratifiedTexts, TextRequest
from free_transformer.serving.onnx_batch import OnnxBatch
from free_transformer.serving.torch_batch import TorchBatch

BITS, BEGIN, PAD, NEW = TINY["latent_dim"], TINY["bos_token_id"], TINY["pad_token_id"], 7


@pytest.fixture
def saturated_model(tiny_model):
    """
    A model whose posterior and prior are certain: the posterior of the bits that the encoder reads, and an aggregate
    prior in which the last two bits are 1 and the others 0.
    """

    def build(span):
        model = tiny_model(plan_span=span)
        with torch.no_grad():
            model.encoder.readout.weight.mul_(1e4)
        model.plan_prior.log_aggregate = torch.full((2**BITS,), -1e4, dtype=torch.float64)
        model.plan_prior.log_aggregate[0b1100] = 0.0
        return model

    return build


def numpy_plan(model, tokens: torch.Tensor, mask: torch.Tensor, plan, prompt_plan: str) -> np.ndarray:
    """The plans of `NEW` more tokens after each prompt, by the NumPy rule."""
    span, rng = model.config.plan_span, np.random.default_rng(0)
    wanted = num_plans(span, tokens.shape[1] + NEW)
    logits = model.infer_plan(tokens, mask).detach().numpy()
    source = PlanSource(
        given=given_plan(None if plan is None else plan.numpy(), len(tokens), BITS, span),
        read=sample_posterior(logits, rng.random(logits.shape)),
        num_read=num_plans_to_read(tokens.numpy(), mask.numpy(), prompt_plan, span, BEGIN),
        sampled=sample_prior((len(tokens), wanted), BITS, model.plan_prior.log_aggregate.numpy(), rng),
    )
    return source.complete(wanted)


def left_padded(tokens: torch.Tensor, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[0] * (tokens.shape[1] - length) + [1] * length for length in lengths])
    return tokens.where(mask.bool(), PAD), mask


@pytest.mark.parametrize("prompt_plan", ["posterior", "prior"])
@pytest.mark.parametrize(("span", "given"), [*product([1, 4], [0, 1, 2, 20]), ("sequence", 0), ("sequence", 1)])
def test_numpy_rule_matches_generate(saturated_model, tokens_like, span, given, prompt_plan):
    model = saturated_model(span)
    tokens, mask = left_padded(tokens_like(4, 9), 9, 5, 1, 2)
    tokens[2, -1] = BEGIN  # an empty prompt
    tokens[3, -2] = BEGIN
    plan = torch.rand(4, given, BITS) < 0.5 if given else None
    output = model.generate(
        tokens,
        attention_mask=mask,
        plan=plan,
        prompt_plan=prompt_plan,
        prior="aggregate",
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
    )
    expected = output.plan.numpy()
    found = numpy_plan(model, tokens, mask, plan, prompt_plan)
    assert expected.shape[1] == torch_num_plans(span, tokens.shape[1] + NEW)
    assert np.array_equal(found[:, : expected.shape[1]], expected)
    if given == 0 and prompt_plan == "posterior":
        assert (found[2] == [False, False, True, True]).all()  # only from the prior
        assert (found[0, 0] == (model.infer_plan(tokens, mask)[0, 0] > 0).numpy()).all()


@pytest.mark.parametrize(
    ("kind", "span", "begin"),
    [
        *product(["torch"], [1, 4, "sequence"], ["bos_token", "eos_token"]),
        pytest.param("onnx", 4, "bos_token", marks=pytest.mark.slow),
        pytest.param("onnx", "sequence", "eos_token", marks=pytest.mark.slow),
    ],
)
def test_served_and_exported_plans_match_generate(saturated_model, tmp_path, span, kind, begin):
    """
    In float32, so that a model and its export have the same certain plans. A text begins with the end-of-text token
    where there is no begin-of-text token.
    """
    model, tokenizer = saturated_model(span), byte_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = None, None
    setattr(tokenizer, begin, "<|begin|>")
    vocabulary = {
        "vocab_size": 259,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 258,
        f"{begin}_id": 256,
    }
    torch.manual_seed(0)
    model = type(model)(type(model.config)(**{**TINY, **vocabulary, "num_layers": 2, "plan_span": span})).eval()
    with torch.no_grad():
        model.encoder.readout.weight.mul_(1e4)
    model.plan_prior.log_aggregate = saturated_model(span).plan_prior.log_aggregate.float()
    if kind == "onnx":
        export_onnx(model, tmp_path / "onnx", tokenizer)
        exported = OnnxFreeTransformer(tmp_path / "onnx", threads=1)
        batch = OnnxBatch(exported)
    else:
        batch = TorchBatch(model, tokenizer)
    for prompt in ([256], [256, *b"a prompt"]):
        for plan in (None, np.array([[True, False, True, True]])):
            output = model.generate(
                torch.tensor([prompt]),
                plan=None if plan is None else torch.from_numpy(plan),
                prompt_plan="posterior",
                prior="aggregate",
                max_new_tokens=NEW,
                do_sample=False,
                return_dict_in_generate=True,
            )
            assert output.sequences.shape[1] == len(prompt) + NEW, "choose another seed: the text ended"
            wanted = batch.num_plans(len(prompt) + NEW - 1)
            expected = output.plan[0, :wanted].numpy()
            new = batch.add(TextRequest(prompt, NEW, plan=plan, prior="aggregate", seed=(0,)))
            batch.remove(0)
            assert np.array_equal(new.plan, expected)
            if kind == "onnx":
                tokens = np.array([prompt])
                rng = np.random.default_rng(0)
                found = exported._complete_plan(
                    plan, tokens, np.ones_like(tokens), len(prompt) + NEW - 1, "posterior", "aggregate", rng
                )
                assert np.array_equal(found[0], expected)


@pytest.mark.parametrize(
    ("kind", "span"),
    [("torch", 4), ("torch", "sequence"), pytest.param("onnx", 4, marks=pytest.mark.slow), ("onnx", "sequence")],
)
def test_served_and_exported_texts_have_stratified_plans(tmp_path, span, kind):
    vocabulary = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": None, "pad_token_id": 258}
    torch.manual_seed(0)
    model = FreeTransformer(FreeTransformerConfig(**{**TINY, **vocabulary, "num_layers": 2, "plan_span": span})).eval()
    with torch.no_grad():
        model.encoder.readout.weight.zero_()
        model.encoder.readout.bias.copy_(torch.tensor([80.0, 0.0, -80.0, 0.0]))
    if kind == "onnx":
        export_onnx(model, tmp_path / "onnx", byte_tokenizer())
        exported = OnnxFreeTransformer(tmp_path / "onnx", threads=1)
        batch = OnnxBatch(exported)
    else:
        batch = TorchBatch(model, byte_tokenizer())
    powers = 1 << np.arange(BITS)
    for prompt, first in (([256], set(range(16))), ([256, *b"a prompt"], {1, 3, 9, 11})):
        together = StratifiedTexts(16, seed=(0, 1))
        plans = []
        for index in range(16):
            plans.append(batch.add(TextRequest(prompt, NEW, together=together, index=index)).plan)
            batch.remove(0)
        codes = np.array(plans) @ powers
        assert set(codes[:, 0]) == first
        if span == 4:
            assert set(codes[:, -1]) == set(range(16))
        if kind == "onnx":
            tokens = np.tile(prompt, (32, 1))
            shape = (tokens, np.ones_like(tokens), len(prompt) + NEW - 1, "posterior", "uniform")
            found = exported._complete_plan(None, *shape, np.random.default_rng(0), 16) @ powers
            assert set(found[:16, 0]) == set(found[16:, 0]) == first
            texts = exported.generate([prompt], plans="stratified", num_return_sequences=16, max_new_tokens=2, seed=0)
            assert texts.shape == (16, len(prompt) + 2)
            assert set(exported.sample_plan(16, method="stratified")[:, 0] @ powers) == set(range(16))
            with pytest.raises(ValueError, match="plans='spread': one of"):
                exported.generate([prompt], plans="spread")
            with pytest.raises(ValueError, match="num_return_sequences=0: an integer of at least 1"):
                exported.generate([prompt], num_return_sequences=0)


def test_plans_without_a_candidate_are_an_error():
    nothing, two = np.zeros((1, 0, BITS), dtype=bool), np.ones((1, 2, BITS), dtype=bool)
    source = PlanSource(given=nothing, read=nothing, num_read=np.array([0]), sampled=two)
    assert source.complete(2).all() and source.complete(1).shape == (1, 1, BITS)
    with pytest.raises(ValueError, match="3 plans are needed, but only 0 are given or read and 2 are sampled"):
        source.complete(3)


def test_number_of_plans_of_integers_and_arrays():
    assert [num_plans(4, tokens) for tokens in (1, 4, 5)] == [1, 1, 2]
    assert num_plans(4, np.array([1, 4, 5])).tolist() == [1, 1, 2]
    assert num_plans("sequence", 9) == 1 and num_plans("sequence", np.array([1, 9])).tolist() == [1, 1]
