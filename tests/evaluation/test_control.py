"""Control as it is measured: a model whose plan decides everything, one whose plan decides nothing."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from free_transformer import bits_to_codes
from free_transformer.data import load_tokenizer
from free_transformer.evaluation import generate_texts, measure_control, sampled_codes

LENGTH = 6


@pytest.fixture
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def steered(tiny_model, tokenizer, monkeypatch):
    """Generates `a` where the plan's bit 0 is set and `b` elsewhere; reads the bit from the text."""
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), plan_span="sequence", bos_token_id=256)

    codes = torch.arange(len(model.plan_table.weight))
    model.plan_table.weight.data[:, 0] = codes % 2  # bit 0

    def compute_logits(lower, plan_states, logits_to_keep=0):
        letters = torch.where(plan_states[:, -1, 0] > 0.5, ord("a"), ord("b"))
        logits = torch.full((*lower.hidden_states.shape[:2], len(tokenizer)), -50.0)
        return logits.scatter(2, letters[:, None, None].expand(-1, logits.shape[1], 1), 50.0)

    def infer_plan(input_ids):
        logits = torch.full((len(input_ids), 1, model.config.latent_dim), 50.0)
        logits[:, 0, 0] = torch.where(input_ids[:, 1] == ord("a"), 50.0, -50.0)
        return logits

    monkeypatch.setattr(model, "compute_logits", compute_logits)
    monkeypatch.setattr(model, "infer_plan", infer_plan)
    return model


def classify(texts) -> np.ndarray:
    return np.array([text.count("a") > text.count("b") for text in texts]).astype(int)


def held_out(count: int) -> tuple[torch.Tensor, np.ndarray]:
    labels = np.arange(count) % 2
    tokens = torch.full((count, LENGTH), 256)
    tokens[:, 1:] = torch.where(torch.from_numpy(labels == 1), ord("a"), ord("b"))[:, None]
    return tokens, labels


def test_a_plan_that_decides_everything_scores_full_marks_and_shuffled_ones_chance(steered, tokenizer):
    tokens, labels = held_out(200)
    control = measure_control(steered, None, tokenizer, classify, tokens, labels, 20, 10, 60)
    assert control.agreement[0] == 1 and control.transfer[0] == 1
    assert 0.55 < control.agreement_shuffled[0] < 0.75  # of ten coin tosses the commoner side
    assert abs(control.transfer_shuffled[0] - 0.5) < 0.15
    assert control.mutual_information == pytest.approx(1)
    assert control.label_entropy == pytest.approx(1)
    assert control.mutual_information_shuffled < 0.05
    assert control.agreement_baseline is None
    assert control.verdicts.shape == (20, 10) and control.plans.shape == (20, 1, 4)
    assert (control.verdicts == control.plans[:, 0, :1].numpy()).all()
    assert control.transferred.shape == (120, 2)


def test_the_random_plans_come_from_the_prior_asked_for(steered, tokenizer):
    tokens, labels = held_out(40)
    with torch.no_grad():
        p = torch.full((16,), 1e-6)
        p[5] = 1
        steered.plan_prior.log_aggregate.copy_(p.log())
    control = measure_control(steered, steered, tokenizer, classify, tokens, labels, 4, 3, 5, prior="aggregate")
    assert (bits_to_codes(control.plans) == 5).all()
    assert control.agreement_baseline is not None


def test_texts_are_written_in_batches_under_their_plans(steered, tokenizer):
    plans = torch.zeros(5, 1, 4, dtype=torch.bool)
    plans[[1, 4]] = True
    texts = generate_texts(steered, tokenizer, 5, LENGTH, batch_size=2, plan=plans)
    assert texts == ["bbbbb", "aaaaa", "bbbbb", "bbbbb", "aaaaa"]


def test_codes_are_sampled_from_the_posterior(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=2), tokens_like(3, 4)
    batches = [{"input_ids": tokens.repeat(500, 1)}] * 2
    codes = sampled_codes(model, batches)
    assert codes.shape == (3000, 2)
    ones = ((codes.reshape(1000, 3, 2)[..., None] >> np.arange(4)) & 1).mean(0)
    assert_close(torch.from_numpy(ones), model.infer_plan(tokens).sigmoid(), atol=0.07, rtol=0)
