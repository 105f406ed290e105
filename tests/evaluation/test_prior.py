"""The aggregate prior and the particle filter, against sums over all plans in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from enumeration import SIZES, all_plans
from free_transformer import FreeTransformer, FreeTransformerConfig, bits_to_codes
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.model.layout import num_plans
from free_transformer.model.plan import UNIFORM_SHARE, PlanPrior, code_probabilities

LN2 = math.log(2)


@pytest.fixture
def model():
    """Plans with an effect, posteriors far from uniform, and an aggregate prior of separate texts."""

    def build(**changes) -> FreeTransformer:
        model = FreeTransformer(FreeTransformerConfig(**{**SIZES, **changes})).eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
            model.plan_table.weight.mul_(2)
            model.encoder.readout.weight.mul_(4)
            model.encoder.readout.bias.uniform_(-1, 1)
        model.gather_prior([{"input_ids": random_tokens(16, 6)}])
        return model

    return build


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape)


def log_prior(model: FreeTransformer, plans: torch.Tensor, prior: str) -> torch.Tensor:
    """(N, P, H) -> (N,), by hand."""
    if prior == "uniform":
        return torch.full((len(plans),), -LN2 * plans[0].numel(), dtype=torch.float64)
    return model.plan_prior.log_aggregate.double()[bits_to_codes(plans)].sum(-1)


@torch.no_grad()
def enumerated(model: FreeTransformer, tokens: torch.Tensor, prior: str) -> torch.Tensor:
    """`log p(x)` of each row, (B,), over all plans."""
    bits, plans = model.config.latent_dim, num_plans(model.config.plan_span, tokens.shape[1])
    everything = all_plans(bits * plans).view(-1, plans, bits)
    losses = []
    for plan in everything:
        logits = model(tokens, plan=plan).logits[:, :-1].double().transpose(1, 2)
        losses.append(F.cross_entropy(logits, tokens[:, 1:], reduction="none").sum(1))
    return (log_prior(model, everything, prior)[:, None] - torch.stack(losses)).logsumexp(0)


def test_nothing_gathered_is_told_and_unknown_names_too():
    prior = PlanPrior(3)
    assert not prior.gathered
    with pytest.raises(ValueError, match=r"has no aggregate prior; call model\.gather_prior"):
        prior.sample(1, 1, "aggregate")
    with pytest.raises(ValueError, match="prior='flat': one of"):
        prior.sample(1, 1, "flat")
    with pytest.raises(ValueError, match="no plans to gather"):
        prior.gather([])


def test_the_aggregate_is_the_mean_posterior_mixed_with_the_uniform_prior():
    prior, logits = PlanPrior(3), torch.randn(5, 3)
    prior.gather([logits[:2], logits[2:]])
    p = logits.double().sigmoid()[:, None]
    mean = torch.where(all_plans(3), p, 1 - p).prod(-1).mean(0)
    expected = (1 - UNIFORM_SHARE) * mean + UNIFORM_SHARE / 8
    assert_close(prior.log_aggregate.double().exp(), expected, atol=1e-6, rtol=0)
    assert prior.gathered
    assert_close(prior.log_prob(all_plans(3), "aggregate"), expected.log().float())


def test_long_plans_are_counted_bit_by_bit():
    prior, logits = PlanPrior(13), torch.randn(50, 13)
    prior.gather([logits])
    ones = (1 - UNIFORM_SHARE) * logits.double().sigmoid().mean(0) + UNIFORM_SHARE / 2
    assert_close(prior.log_aggregate[1].double().exp(), ones, atol=1e-6, rtol=0)
    plan = torch.rand(4, 13) < 0.5
    assert_close(prior.log_prob(plan, "aggregate").double(), torch.where(plan, ones, 1 - ones).log().sum(-1))
    share = prior.sample(4000, 1, "aggregate").float().mean((0, 1))
    assert_close(share.double(), ones, atol=0.04, rtol=0)


def test_code_probabilities_are_products_of_the_bits():
    p = torch.rand(4, 3)
    assert_close(code_probabilities(p), torch.where(all_plans(3), p[:, None], 1 - p[:, None]).prod(-1))


def test_samples_follow_the_prior():
    prior = PlanPrior(3)
    prior.gather([torch.randn(6, 3) * 3])
    for name in ("uniform", "aggregate"):
        codes = bits_to_codes(prior.sample(4000, 2, name))
        assert codes.shape == (4000, 2)
        expected = prior.log_prob(all_plans(3), name).exp()
        assert_close(torch.bincount(codes.flatten(), minlength=8) / 8000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("latent_dim", [3, 13])
@pytest.mark.parametrize("name", ["uniform", "aggregate"])
def test_kl_is_that_of_the_enumerated_posterior(latent_dim, name):
    prior, logits = PlanPrior(latent_dim), torch.randn(4, latent_dim)
    prior.gather([torch.randn(9, latent_dim)])
    plans, p = all_plans(latent_dim), logits.double().sigmoid()[:, None]
    q = torch.where(plans, p, 1 - p).prod(-1)
    expected = (q * (q.log() - prior.log_prob(plans, name).double())).sum(-1) / LN2
    assert_close(prior.kl(logits, name).double(), expected, atol=1e-4, rtol=1e-4)


def test_the_prior_is_saved_with_the_model(model, tmp_path):
    saved = model(plan_span="sequence")
    saved.save_pretrained(tmp_path)
    loaded = FreeTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded.plan_prior.log_aggregate, saved.plan_prior.log_aggregate)
    assert loaded.plan_prior.gathered


def test_padding_and_other_documents_are_not_gathered(model):
    model, tokens = model(plan_span=2), random_tokens(3, 6)
    model.gather_prior([{"input_ids": tokens}])
    alone = model.plan_prior.log_aggregate.clone()
    mask = F.pad(torch.ones_like(tokens), (0, 5))
    model.gather_prior([{"input_ids": F.pad(tokens, (0, 5)), "attention_mask": mask}])
    assert_close(model.plan_prior.log_aggregate, alone, atol=1e-5, rtol=1e-5)


def test_generation_draws_new_plans_from_the_aggregate_and_keeps_given_ones(model):
    model, prompt = model(plan_span=1), random_tokens(200, 1)
    with torch.no_grad():
        model.plan_prior.log_aggregate.copy_(torch.tensor([0.001, 0.001, 0.997, 0.001]).log())
    given = torch.tensor([[True, True]])
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "plan": given}
    output = model.generate(prompt, prior="aggregate", return_dict_in_generate=True, use_cache=True, **arguments)
    with torch.no_grad():
        plan = model(output.sequences, mode="inference", plan=given, prompt_plan="prior", prior="aggregate").plan
    codes = bits_to_codes(plan)
    assert (codes[:, 0] == 3).all()
    assert (codes[:, 1:] == 2).float().mean() > 0.98


def test_generation_refuses_a_prior_that_it_lacks():
    fresh = FreeTransformer(FreeTransformerConfig(**SIZES))
    with pytest.raises(ValueError, match="has no aggregate prior"):
        fresh.generate(random_tokens(1, 2), prior="aggregate", max_new_tokens=1)


@pytest.mark.parametrize("span", ["sequence", 2])
def test_exact_and_importance_follow_the_aggregate(model, span):
    model, tokens = model(plan_span=span), random_tokens(3, 5)
    truth = enumerated(model, tokens, "aggregate")
    value = evaluate_likelihood(model, [{"input_ids": tokens}], 4000, prior="aggregate")
    assert_close(torch.from_numpy(value.per_document["nll"]), -truth, atol=0.05, rtol=0)
    assert value.plan_prior == "aggregate"
    if span == "sequence":
        exact = evaluate_likelihood(model, [{"input_ids": tokens}], method="exact", prior="aggregate")
        assert_close(torch.from_numpy(exact.per_document["nll"]), -truth, atol=1e-4, rtol=1e-5)
        assert exact.elbo > exact.nll


@pytest.mark.parametrize("prior", ["uniform", "aggregate"])
@pytest.mark.parametrize(("span", "particles"), [(1, 1), (1, 4), (2, 4), ("sequence", 4)])
def test_the_particle_filter_has_no_bias(model, span, particles, prior):
    model, tokens = model(plan_span=span), random_tokens(2, 5)
    truth = enumerated(model, tokens, prior).exp().numpy()
    copies = 3000
    batch = {"input_ids": tokens.repeat(copies, 1)}
    value = evaluate_likelihood(model, [batch], particles, "particle_filter", prior)
    ratio = np.exp(-value.per_document["nll"]).reshape(copies, 2) / truth
    error = ratio.std(0, ddof=1) / copies**0.5
    assert (np.abs(ratio.mean(0) - 1) < 4 * error).all()
    assert (error < 0.1).all()  # so that the check is not trivial


def test_the_particle_filter_is_tighter_than_weights_of_whole_texts(model):
    model, tokens = model(plan_span=1), random_tokens(64, 16)
    batches = [{"input_ids": tokens}]
    filtered = evaluate_likelihood(model, batches, 16, "particle_filter")
    weighted = evaluate_likelihood(model, batches, 16)
    assert filtered.nll < weighted.nll - 0.01
    assert filtered.method == "particle_filter"


@pytest.mark.parametrize("span", [2, "sequence"])
def test_the_particle_filter_reads_padding_and_packed_rows(model, span):
    """With very many particles each estimate is the exact one."""
    model, tokens = model(plan_span=span), [random_tokens(1, 3), random_tokens(1, 5)]
    truth = [-float(enumerated(model, row, "uniform")) for row in tokens]
    length = 8
    left = [F.pad(row, (length - row.shape[1], 0)) for row in tokens]
    masks = [F.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in tokens]
    padded = {"input_ids": torch.cat(left), "attention_mask": torch.cat(masks)}
    positions = torch.cat([torch.arange(row.shape[1]) for row in tokens])[None]
    packed = {"input_ids": torch.cat(tokens, 1), "position_ids": positions}
    for batch in (padded, packed):
        value = evaluate_likelihood(model, [batch], 3000, "particle_filter")
        assert_close(value.per_document["nll"], np.array(truth), atol=0.1, rtol=0)
