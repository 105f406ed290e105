import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from free_transformer.model.losses import (
    LossWeights,
    aggregate_divergence,
    free_bits_hinge,
    kl_bits,
    min_bits_shortfall,
    objective,
    predicted_tokens,
    reconstruction_loss,
)
from free_transformer.model.plan import codes_to_bits

CERTAIN, EVEN = 80.0, 0.0


def objective_of(logits, labels, plan_logits=None, plan_mask=None, num_tokens=None, **weights):
    tokens = predicted_tokens(labels) if num_tokens is None else num_tokens
    return objective(reconstruction_loss(logits, labels), tokens, plan_logits, plan_mask, LossWeights(**weights))


def random_case(batch: int = 2, tokens: int = 5, vocab: int = 7):
    logits = torch.randn(batch, tokens, vocab, dtype=torch.float64)
    return logits, torch.randint(vocab, (batch, tokens))


def test_kl_is_the_divergence_from_the_uniform_prior_in_bits():
    p = torch.tensor([0.5, 0.25, 0.9, 0.001], dtype=torch.float64)
    by_hand = sum(q * math.log2(q / 0.5) + (1 - q) * math.log2((1 - q) / 0.5) for q in p.tolist())
    assert_close(kl_bits(p.logit()).item(), by_hand)


def test_kl_is_zero_at_the_prior_and_one_bit_for_each_bit_that_is_certain():
    logits = torch.tensor([[EVEN] * 4, [CERTAIN, -CERTAIN, -CERTAIN, CERTAIN], [EVEN, CERTAIN, EVEN, -CERTAIN]])
    assert_close(kl_bits(logits), torch.tensor([0.0, 4.0, 2.0]))
    assert kl_bits(torch.zeros(3, 5, 8)).shape == (3, 5)


def test_kl_is_even_in_the_logits_and_never_negative():
    logits = torch.linspace(-90, 90, 1801, dtype=torch.float64)[:, None]
    assert_close(kl_bits(logits), kl_bits(-logits), atol=1e-12, rtol=0)
    assert (kl_bits(logits) > -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kl_and_its_gradient_are_finite_in_half_precision(dtype):
    logits = torch.tensor([[CERTAIN, -CERTAIN], [EVEN, CERTAIN], [15.0, -15.0]], dtype=dtype, requires_grad=True)
    kl = kl_bits(logits)
    kl.sum().backward()
    assert kl.dtype == torch.float32
    assert_close(kl.detach(), torch.tensor([2.0, 1.0, 2.0]), atol=1e-4, rtol=0)
    assert logits.grad.isfinite().all()


def test_free_bits_are_granted_to_each_plan_not_to_the_batch():
    plan_logits = torch.tensor([[[EVEN] * 4, [CERTAIN] * 4]])  # 0 and 4 bits: 2 on average
    assert_close(free_bits_hinge(kl_bits(plan_logits), 2.0), torch.tensor([[0.0, 2.0]]))
    logits, labels = random_case(batch=1, tokens=6)
    result = objective_of(logits, labels, plan_logits, free_bits=2.0, kl_weight=0.5)
    assert_close((result.loss - result.reconstruction).item(), 0.5 * 2 * math.log(2) / 5, atol=1e-6, rtol=1e-6)
    assert_close(result.kl.item(), 2.0)


def test_gradient_of_the_hinge_is_that_of_the_clamp():
    kl = torch.tensor([0.0, 0.4, 0.6, 3.0], dtype=torch.float64, requires_grad=True)
    hinge = torch.autograd.grad(free_bits_hinge(kl, 0.5).sum(), kl)[0]
    clamp = torch.autograd.grad(kl.clamp(min=0.5).sum(), kl)[0]
    assert_close(hinge, clamp)


@pytest.mark.parametrize("ignored", [0, 3])
def test_reconstruction_is_the_mean_cross_entropy_of_the_next_tokens_that_count(ignored):
    logits, labels = random_case()
    labels[0, :ignored] = -100
    result = objective_of(logits, labels)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_close(result.reconstruction, expected)
    assert_close(result.loss, expected)
    assert result.kl is None
    assert predicted_tokens(labels) == (labels[:, 1:] != -100).sum()


def test_hinge_is_divided_by_the_predicted_tokens_and_weighted():
    logits, labels = random_case()
    plan_logits = torch.randn(2, 3, 4, dtype=torch.float64)
    labels[1, 3:] = -100
    result = objective_of(logits, labels, plan_logits, free_bits=0.25, kl_weight=0.3)
    hinge = (kl_bits(plan_logits) - 0.25).clamp(min=0).sum() * math.log(2) / (4 + 2)
    assert_close(result.loss, result.reconstruction + 0.3 * hinge)
    assert_close(result.kl, kl_bits(plan_logits).mean())


def test_masked_plans_do_not_count():
    logits, labels = random_case()
    plan_logits = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    result = objective_of(logits, labels, plan_logits, mask, free_bits=0.25)
    kl = kl_bits(plan_logits)[mask]
    assert_close(result.kl, kl.mean())
    assert_close(result.loss - result.reconstruction, (kl - 0.25).clamp(min=0).sum() * math.log(2) / 8)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_given_number_of_tokens_divides_reconstruction_and_kl(as_tensor):
    logits, labels = random_case()
    plan_logits = torch.randn(2, 3, 4, dtype=torch.float64)
    own = objective_of(logits, labels, plan_logits)
    given = objective_of(logits, labels, plan_logits, num_tokens=torch.tensor(32) if as_tensor else 32)
    assert_close(given.loss, own.loss * 8 / 32)
    assert_close(given.reconstruction, own.reconstruction * 8 / 32)
    assert_close(given.kl, own.kl)


def test_nothing_to_predict_is_a_loss_of_zero():
    logits, labels = random_case()
    result = objective_of(logits.requires_grad_(), torch.full_like(labels, -100), torch.zeros(2, 1, 4))
    result.loss.backward()
    assert result.loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_objective_of_half_precision_logits_is_computed_in_full_precision(dtype):
    logits, labels = random_case(batch=4, tokens=64, vocab=50)
    logits = (8 * logits).to(dtype)
    result = objective_of(logits, labels, torch.full((4, 1, 4), CERTAIN, dtype=dtype))
    expected = objective_of(logits.double(), labels, torch.full((4, 1, 4), CERTAIN, dtype=torch.float64))
    assert result.loss.dtype == torch.float32
    assert_close(result.loss.double(), expected.loss, atol=0, rtol=1e-5)


def test_aggregate_divergence_is_that_of_the_pairs_enumerated():
    logits = torch.randn(5, 4, dtype=torch.float64) * 2
    bits = codes_to_bits(torch.arange(16), 4)
    q = torch.where(bits, logits.sigmoid()[:, None], 1 - logits.sigmoid()[:, None]).prod(-1)  # (5, 16)
    collisions = [(q[i] * q[j]).sum() for i in range(5) for j in range(5) if i != j]
    expected = 4 + torch.stack(collisions).mean().log2()
    assert_close(aggregate_divergence(logits), expected)


def test_aggregate_divergence_is_zero_of_plans_that_say_nothing_and_h_of_plans_all_alike():
    assert_close(aggregate_divergence(torch.zeros(6, 3)), torch.tensor(0.0))
    assert_close(aggregate_divergence(torch.full((6, 3), 60.0)), torch.tensor(3.0))


def test_aggregate_divergence_is_finite_for_sure_plans_that_never_collide_and_for_a_single_plan():
    logits = torch.tensor([[80.0] * 8, [-80.0] * 8], requires_grad=True)
    aggregate_divergence(logits).backward()
    assert logits.grad.isfinite().all()
    assert aggregate_divergence(torch.ones(1, 8)) == 0


def test_a_plan_pays_for_what_it_lacks_to_min_bits_by_itself():
    assert_close(min_bits_shortfall(torch.tensor([0.5, 3.0]), 2.0), torch.tensor([1.5, 0.0]))


def test_objective_adds_shortfall_and_aggregate_divergence_in_nats_per_token():
    torch.manual_seed(0)
    logits, labels, plan_logits = torch.randn(4, 9, 7), torch.randint(7, (4, 9)), torch.randn(4, 1, 3) * 0.1
    plain = objective_of(logits, labels, plan_logits, free_bits=2.0)
    both = objective_of(logits, labels, plan_logits, free_bits=2.0, min_bits=1.0, aggregate_weight=0.5)
    bits = 1.5 * min_bits_shortfall(kl_bits(plan_logits), 1.0).sum() + 0.5 * 4 * aggregate_divergence(plan_logits[:, 0])
    assert_close(both.loss - plain.loss, bits * math.log(2) / 32)
