"""Plans from plans, and what a bit does to the next token."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from free_transformer.data import byte_tokenizer
from free_transformer.evaluation import bit_effects
from free_transformer.evaluation.plan_ops import average_posteriors, flip_bit, path, plan_of_text, set_bits
from free_transformer.model.context import EXAMPLE_WINDOWS, example_windows
from free_transformer.model.losses import kl_bits_per_bit

PLAN = torch.tensor([[True, False, True], [False, False, True]])


def test_bits_are_fixed_in_each_plan_and_the_plan_given_stays():
    plan = PLAN.clone()
    assert set_bits(plan, {0: 1, 2: False}).tolist() == [[True, False, False], [True, False, False]]
    assert torch.equal(plan, PLAN)
    assert set_bits(plan[None], {1: True}).shape == (1, 2, 3)


def test_a_flipped_bit_is_turned_over_in_each_plan():
    assert flip_bit(PLAN, 0).tolist() == [[False, False, True], [True, False, True]]
    assert torch.equal(flip_bit(flip_bit(PLAN, 1), 1), PLAN)


@pytest.mark.parametrize("change", [lambda plan: set_bits(plan, {3: 1}), lambda plan: flip_bit(plan, -1)])
def test_bits_that_are_not_there_are_named(change):
    with pytest.raises(ValueError, match="plans of this model have bits 0 to 2"):
        change(PLAN)


def test_a_value_that_is_no_bit_is_named():
    with pytest.raises(ValueError, match="bit 1: value 2 is neither 0 nor 1"):
        set_bits(PLAN, {1: 2})


def test_a_path_changes_one_bit_at_a_time():
    end = torch.tensor([[False, False, True], [True, True, True]])
    steps = path(PLAN, end)
    assert steps.shape == (4, 2, 3)
    assert torch.equal(steps[0], PLAN) and torch.equal(steps[-1], end)
    assert [int((a != b).sum()) for a, b in pairwise(steps)] == [1, 1, 1]
    assert torch.equal(path(PLAN, PLAN), PLAN[None])
    with pytest.raises(ValueError, match="the shapes must be equal"):
        path(PLAN, PLAN[:1])


def test_the_average_is_of_probabilities():
    logits = torch.tensor([[[0.0, 100.0, -4.0]], [[2.0, 100.0, -100.0]]])
    expected = (0.5 + 1 / (1 + math.exp(-2))) / 2
    average = average_posteriors(logits)
    assert average.shape == (1, 3)
    assert_close(average[0, 0].sigmoid(), torch.tensor(expected))
    assert torch.isfinite(average).all()
    assert (average > 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize("span", [2, "sequence"])
def test_the_effect_of_a_bit_is_the_divergence_of_two_forwards(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(3, 7)
    effects = bit_effects(model, [{"input_ids": tokens[:2]}, {"input_ids": tokens[2:]}])
    logits = model.infer_plan(tokens)
    with torch.no_grad():
        before = model(tokens, plan=logits > 0).logits.log_softmax(-1)
        for effect in effects:
            after = model(tokens, plan=flip_bit(logits > 0, effect.bit)).logits.log_softmax(-1)
            per_row = (before.exp() * (before - after)).sum(-1).mean(1)
            assert effect.effect == pytest.approx(float(per_row.mean()), abs=1e-6)
            assert effect.standard_error == pytest.approx(float(per_row.std() / 3**0.5), abs=1e-6)
    spent = kl_bits_per_bit(logits).mean((0, 1))
    assert [effect.spent for effect in effects] == pytest.approx(spent.tolist(), abs=1e-5)


def test_dead_bits_are_named_with_the_reason(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span="sequence", code_bits=1), tokens_like(8, 32)
    assert len(model.plan_table.weight) == 8  # two rows per bit
    readout, codebook = model.encoder.readout, model.plan_table.weight
    with torch.no_grad():
        readout.bias -= model.infer_plan(tokens).mean((0, 1))
        readout.weight *= 100  # each text sets its bits
        readout.bias *= 100
        readout.weight[:2] = 0
        readout.bias[:2] = torch.tensor([0.0, 5.0])  # bit 0: in no text, bit 1: the same in all texts
        codebook *= 10
        codebook[5] = codebook[4]  # bit 2: not visible to the decoder
    effects = bit_effects(model, [{"input_ids": tokens}])
    reasons = ["no text sets it", "same value in all texts", "flipping it changes nothing", None]
    assert [effect.dead for effect in effects] == reasons


def test_padding_does_not_count(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span="sequence"), tokens_like(1, 6)
    alone = bit_effects(model, [{"input_ids": tokens}])
    padded = torch.nn.functional.pad(tokens, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0))
    together = bit_effects(model, [{"input_ids": padded, "attention_mask": mask}])
    assert [each.effect for each in together] == pytest.approx([each.effect for each in alone], abs=1e-6)


def test_no_text_is_refused(tiny_model):
    with pytest.raises(ValueError, match="there are no batches"):
        bit_effects(tiny_model(), [])


@pytest.mark.parametrize("length", [0, 1, 9, 10, 25, 90, 10_000])
def test_the_windows_of_an_example_cover_it_evenly(length):
    text = list(range(1000, 1000 + length))
    windows = example_windows([7, *text], 10, "sequence")
    assert len(windows) == max(1, min(math.ceil(length / 9), EXAMPLE_WINDOWS))
    assert all(window[0] == 7 and len(window) == min(length + 1, 10) for window in windows)
    starts = [window[1] for window in windows if length]
    assert length == 0 or (starts[0] == text[0] and windows[-1][-1] == text[-1])
    steps = [after - before for before, after in pairwise(starts)]
    assert not steps or max(steps) - min(steps) <= 1
    if length <= 9 * EXAMPLE_WINDOWS:
        assert {token for window in windows for token in window[1:]} == set(text)
    assert example_windows([7, *text], 10, 4) == [[7, *text[:9]]]


def test_the_plan_of_a_long_example_is_not_that_of_its_title(tiny_model, monkeypatch):
    model = tiny_model(vocab_size=259, plan_span="sequence", max_seq_len=16)

    def logits(windows):
        of_title = (windows == ord("T")).any(1)[:, None, None]
        return torch.where(of_title, 30.0, -3.0).expand(-1, 1, 4)

    monkeypatch.setattr(model, "infer_plan", logits)
    assert plan_of_text(model, byte_tokenizer(), "T").all()
    assert not plan_of_text(model, byte_tokenizer(), "TITLE" + 90 * "x").any()
