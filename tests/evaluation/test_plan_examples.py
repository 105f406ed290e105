"""What plans do, in examples: texts under plans, flipped bits, and plans by source."""

import numpy as np
import pytest
import torch

from free_transformer.data import build_rows, byte_tokenizer
from free_transformer.evaluation import bit_effects, make_plan_examples
from free_transformer.evaluation.plan_examples import (
    SharedNoise,
    common_plans,
    common_word,
    plans_by_source,
    posterior_codes,
)

TEXTS = {"a": ["the cat sat on the mat. " * 3] * 6, "b": ["DOGS RUN TO THE HOUSE " * 3] * 6}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def rows_of(tokenizer, *labels):
    return build_rows([text for label in labels for text in TEXTS[label]], tokenizer, 24)


@pytest.fixture
def examples_of(tiny_model, tokenizer):
    def make(**changes):
        options = {"vocab_size": len(tokenizer), "max_seq_len": 24, "bos_token_id": tokenizer.bos_token_id}
        options |= {"pad_token_id": tokenizer.pad_token_id, "plan_span": "sequence"}
        model = tiny_model(torch.float32, **{**options, **changes})
        torch.nn.init.normal_(model.plan_table.weight, std=3.0)
        by_source = {label: rows_of(tokenizer, label) for label in TEXTS}
        return model, make_plan_examples(model, tokenizer, rows_of(tokenizer, *TEXTS), by_source)

    return make


def test_examples_are_of_the_model_and_repeatable(examples_of, tokenizer):
    model, examples = examples_of()
    torch.manual_seed(5)
    assert len(examples.texts) == 4 and len({each.plan for each in examples.texts}) >= 2
    assert all(each.text.startswith(examples.prompt) and len(each.plan) == 4 for each in examples.texts)
    assert examples == examples_of_same(model, tokenizer)
    expected = {each.bit: each.effect for each in bit_effects(model, rows_of(tokenizer, *TEXTS).in_order(8))}
    assert {each.bit: each.effect for each in examples.bits} == pytest.approx(expected, rel=1e-3)
    effects = [each.effect for each in examples.bits]
    assert effects == sorted(effects, reverse=True)


def examples_of_same(model, tokenizer):
    return make_plan_examples(
        model, tokenizer, rows_of(tokenizer, *TEXTS), {label: rows_of(tokenizer, label) for label in TEXTS}
    )


def test_a_flipped_text_is_that_of_the_flipped_plan(examples_of, tokenizer):
    """A bit without an effect changes nothing, since all texts are sampled with the same random numbers."""
    model, examples = examples_of()
    assert any(each.text != examples.texts[0].text for each in examples.bits)
    torch.nn.init.zeros_(model.plan_table.weight)
    again = examples_of_same(model, tokenizer)
    assert {each.text for each in (*again.texts, *again.bits)} == {again.texts[0].text}
    assert max(each.effect for each in again.bits) == pytest.approx(0.0, abs=1e-6)


def test_plans_by_source_count_the_most_likely_plans(examples_of, tokenizer):
    model, examples = examples_of()
    sources = examples.sources
    assert sources.labels == ["a", "b"] and np.allclose(np.sum(sources.shares, axis=1), 1)
    codes = posterior_codes(model, rows_of(tokenizer, "a"))
    tokens = torch.from_numpy(rows_of(tokenizer, "a").tokens).long()
    assert sources.texts[0] == len(codes) >= len(tokens)


def test_models_with_many_plans_per_text_have_no_sources(examples_of):
    _, examples = examples_of(plan_span=8)
    assert examples.sources is None
    assert all(each.share is None and each.plan.count(" ") == 2 for each in examples.texts)


def test_plans_are_grouped_by_their_live_bits():
    codes = ["0010"] * 3 + ["0011"] * 2 + ["1000"] * 4 + ["0100"]
    assert common_plans(codes, live={0, 1, 2}) == {"0010": 0.5, "1000": 0.4, "0100": 0.1}
    assert common_plans(codes, live=()) == {"1000": 0.4, "0010": 0.3, "0011": 0.2, "0100": 0.1}
    sources = plans_by_source({"x": ["10", "11", "00"], "y": ["00"]}, live={0})
    assert (sources.plans, sources.texts) == (["1·", "0·"], [3, 1])
    assert np.allclose(sources.shares, [[2 / 3, 1 / 3], [0, 1]])
    many = plans_by_source({"x": [f"{code:04b}" for code in range(16)], "y": ["0000"]}, live=range(4))
    assert many.plans[-1] == "other" and len(many.plans) == 13 and many.shares[0][-1] == pytest.approx(4 / 16)


def test_the_prompt_is_the_most_common_word():
    assert common_word(["the cat, the end", "a1 a1 a1", "verylongwordthatdecides " * 9]) == "the"
    assert common_word(["____ !!", ""]) == ""


def test_shared_noise_samples_every_row_from_its_distribution():
    scores = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    noise = SharedNoise(temperature=0.5, seed=0)
    drawn = torch.stack([noise(None, scores).argmax(-1) for _ in range(4000)])
    assert torch.equal(drawn[:, 0], drawn[:, 1])  # rows with the same logits
    for row in (0, 2):
        shares = torch.bincount(drawn[:, row], minlength=3) / len(drawn)
        assert torch.allclose(shares, (scores[row] / 0.5).softmax(-1), atol=0.03)  # 4 standard errors
