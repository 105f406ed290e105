"""Stratified plans: each is distributed exactly as the prior, and together they cover it."""

import numpy as np
import pytest
import torch

from free_transformer.errors import InputError
from free_transformer.model.plan import PlanPrior, bits_to_codes, draw_stratified
from free_transformer.model.stratified import (
    chance_of_bits,
    chance_of_codes,
    chance_of_prior,
    numbers_per_set,
    stratify,
)
from free_transformer.runtime.plan_source import sample_stratified_posterior, sample_stratified_prior

SKEWED = np.array([0.3, 0.001, 0.0, 0.15, 0.02, 0.2, 0.125, 0.204])  # of codes of 3 bits
SPANS = [4, "sequence"]
BOS = 1


def codes_of(plans: np.ndarray) -> np.ndarray:
    return plans @ (1 << np.arange(plans.shape[-1]))


def sets_of_codes(chance, k: int, bits: int, sets: int) -> np.ndarray:
    """(sets, k) codes."""
    uniform = np.random.default_rng(0).random((sets, numbers_per_set(k, bits)))
    return codes_of(stratify(chance, k, bits, uniform))


def counts_of(codes: np.ndarray, outcomes: int) -> np.ndarray:
    """How often each code occurs in each set, (sets, outcomes)."""
    return (codes[..., None] == np.arange(outcomes)).sum(1)


def parts_of(probabilities: np.ndarray, k: int) -> list[range]:
    """The codes, their halves, halves of these and so on, until no part has more than 1/k of the probability."""

    def split(low: int, high: int) -> list[range]:
        if high - low == 1 or probabilities[low:high].sum() <= 1 / k:
            return [range(low, high)]
        middle = (low + high) // 2
        return [range(low, high), *split(low, middle), *split(middle, high)]

    return split(0, len(probabilities))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 13])
def test_codes_follow_the_distribution_and_fill_the_strata(k):
    sets, bits = 4000, 3
    counts = counts_of(sets_of_codes(chance_of_codes(SKEWED), k, bits, sets), len(SKEWED))
    for part in parts_of(SKEWED, k):
        expected = k * SKEWED[list(part)].sum()
        found = counts[:, list(part)].sum(1)
        assert (np.abs(found - expected) < 1 + 1e-9).all()
        assert abs(found.mean() - expected) < 5 * 0.5 / sets**0.5
    assert (counts[:, k * SKEWED >= 1 + 1e-9] >= 1).all()
    assert counts[:, k * SKEWED < 1 - 1e-9].max(initial=0) <= 1
    assert (counts[:, SKEWED == 0] == 0).all()


def test_no_combination_of_bits_is_left_out():
    """Without random halves, 12 of 16 codes would leave out all that have one combination of the two lowest bits."""
    codes = sets_of_codes(chance_of_prior(None, 4), 12, 4, 2000)
    combinations = counts_of(codes % 4, 4)
    assert (combinations.mean(0) - 3 < 0.1).all()
    assert (combinations.min(1) > 0).mean() > 0.95


@pytest.mark.parametrize("k", [2, 3, 7])
def test_each_plan_by_itself_is_distributed_as_the_prior(k):
    """Frequencies at each position of the set, within five standard errors."""
    sets = 40_000
    for chance, expected in (
        (chance_of_codes(SKEWED), SKEWED),
        (chance_of_bits(np.array([0.3, 0.9, 0.5])), np.array([0.035, 0.015, 0.315, 0.135, 0.035, 0.015, 0.315, 0.135])),
    ):
        codes = sets_of_codes(chance, k, 3, sets)
        for place in range(k):
            share = np.bincount(codes[:, place], minlength=8) / sets
            assert (np.abs(share - expected) <= 5 * (expected * (1 - expected) / sets) ** 0.5).all()


def test_chances_of_codes_agree_with_those_of_bits():
    bits = np.array([0.2, 0.7, 0.5, 0.99])
    plans = (np.arange(16)[:, None] >> np.arange(4)) % 2 == 1
    table = np.where(plans, bits, 1 - bits).prod(1)
    uniform = np.random.default_rng(2).random((50, numbers_per_set(6, 4)))
    assert np.array_equal(
        stratify(chance_of_codes(table), 6, 4, uniform), stratify(chance_of_bits(bits), 6, 4, uniform)
    )


@pytest.mark.parametrize(("bits", "k"), [(3, 8), (3, 5), (3, 24), (8, 16), (64, 64)])
def test_uniform_prior_covers_codes_and_balances_bits(bits, k):
    uniform = np.random.default_rng(0).random((100, numbers_per_set(k, bits)))
    plans = stratify(chance_of_prior(None, bits), k, bits, uniform)
    for one in plans:
        distinct, counts = np.unique(one, axis=0, return_counts=True)
        assert len(distinct) == min(k, 2**bits) and counts.max() == -(-k // 2**bits)
        if k & (k - 1) == 0:
            assert (one.sum(0) == k / 2).all()
    if bits == 64:  # no bits are copies of each other
        correlations = np.corrcoef(plans[:, :, :8].reshape(-1, 8).T)
        assert np.abs(correlations - np.eye(8)).max() < 0.1


def test_eight_equally_common_modes():
    """8 stratified plans cover them; independent plans need 8 (1/1 + … + 1/8) = 21.7 on average."""
    log_aggregate = np.full(256, -np.inf)
    log_aggregate[5::32] = -np.log(8)
    codes = sets_of_codes(chance_of_prior(log_aggregate, 8), 8, 8, 500)
    assert (np.sort(codes, 1) == np.arange(5, 256, 32)).all()
    draws = np.random.default_rng(0).integers(8, size=(4000, 200))
    first = (draws[..., None] == np.arange(8)).argmax(1)  # of each mode
    assert abs(first.max(1).mean() + 1 - 8 * (1 / np.arange(1, 9)).sum()) < 0.5


def test_torch_and_numpy_draw_the_same_plans(monkeypatch):
    """From the same random numbers, under all three kinds of prior, and from a posterior."""
    numbers = np.random.default_rng(3).random(10_000)

    class Replayed:
        def random(self, shape):
            return numbers[: np.prod(shape)].reshape(shape)

    def replayed(shape, dtype, **_):
        return torch.from_numpy(numbers[: np.prod(shape)].reshape(shape)).to(dtype)

    monkeypatch.setattr(torch, "rand", replayed)
    for bits, name in ((5, "uniform"), (5, "aggregate"), (20, "aggregate")):
        prior = PlanPrior(bits)
        prior.gather([torch.randn(40, bits, generator=torch.Generator().manual_seed(0))])
        known = None if name == "uniform" else prior.log_aggregate.numpy()
        found = prior.sample(8, 3, name, samples_per_set=4)
        assert np.array_equal(found, sample_stratified_prior((8, 3), bits, known, Replayed(), 4))
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    chance = chance_of_bits(logits.double().sigmoid().numpy())
    drawn = draw_stratified(chance, (2, 3), 4, 5, torch.device("cpu")).transpose(1, 2).flatten(0, 1)
    assert np.array_equal(drawn, sample_stratified_posterior(logits.numpy(), 4, Replayed()))


def test_sample_plan_stratifies_each_place_by_itself(tiny_model):
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    plans = model.sample_plan(16, 6, generator, method="stratified")
    codes = bits_to_codes(plans)
    assert (codes.sort(0).values == torch.arange(16)[:, None]).all()
    assert len({tuple(column) for column in codes.T.tolist()}) == 6  # each in a separate order
    longer = model.sample_plan(16, 9, generator.manual_seed(0), method="stratified")
    assert torch.equal(longer[:, :6], plans)
    with pytest.raises(InputError, match=r"method='spread': one of \('independent', 'stratified'\)"):
        model.sample_plan(4, 1, method="spread")


def generate(model, tokens, k: int, seed: int = 0, new: int = 9, **options):
    torch.manual_seed(seed)
    options = {"do_sample": True, "plans": "stratified", **options}
    return model.generate(tokens, max_new_tokens=new, num_return_sequences=k, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("span", SPANS)
def test_generated_texts_of_each_prompt_cover_the_plans(tiny_model, tokens_like, span, do_sample):
    model, tokens = tiny_model(plan_span=span), tokens_like(2, 6)
    for prior in ("uniform", "aggregate"):
        model.plan_prior.gather([torch.zeros(1, model.config.latent_dim)])
        output = generate(model, tokens, 16, prompt_plan="prior", prior=prior, do_sample=do_sample)
        codes = bits_to_codes(output.plan).view(2, 16, -1)
        assert (codes.sort(1).values == torch.arange(16)[:, None]).all()
        assert torch.equal(output.sequences[:, :6], tokens.repeat_interleave(16, 0))
    again = generate(model, tokens, 16, prompt_plan="prior", prior="aggregate", do_sample=do_sample)
    assert torch.equal(again.sequences, output.sequences) and torch.equal(again.plan, output.plan)


@pytest.mark.parametrize("span", SPANS)
def test_longer_text_begins_as_a_shorter_one(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span), tokens_like(2, 6)
    short, long = (generate(model, tokens, 3, new=new) for new in (6, 20))
    assert torch.equal(long.sequences[:, :12], short.sequences)
    assert torch.equal(long.plan[:, : short.plan.shape[1]], short.plan)


def test_posterior_of_the_prompt_is_stratified(tiny_model, tokens_like):
    """Plans that the encoder is sure of stay the same for all texts, and uncertain bits are balanced."""
    model, tokens = tiny_model(plan_span="sequence"), tokens_like(1, 6)
    with torch.no_grad():
        model.encoder.readout.weight.zero_()
        model.encoder.readout.bias.copy_(torch.tensor([80.0, 0.0, -80.0, 0.0]))
    plans = generate(model, tokens, 8).plan[:, 0]
    assert plans[:, 0].all() and not plans[:, 2].any()
    assert sorted(bits_to_codes(plans[:, [1, 3]]).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_given_plans_stay_and_empty_prompts_take_the_prior(tiny_model):
    model = tiny_model(plan_span=4)
    empty = torch.full((1, 1), BOS)
    assert set(bits_to_codes(generate(model, empty, 16).plan[:, 0]).tolist()) == set(range(16))
    given = torch.tensor([[True, False, True, True]])
    plans = generate(model, empty, 16, plan=given).plan
    assert (plans[:, :1] == given).all()
    assert set(bits_to_codes(plans[:, 1]).tolist()) == set(range(16))


def test_unknown_kind_of_plans(tiny_model, tokens_like):
    with pytest.raises(InputError, match=r"plans='spread': one of \('independent', 'stratified'\)"):
        tiny_model().generate(tokens_like(1, 4), plans="spread", max_new_tokens=2)


def test_independent_plans_are_the_default(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=4), tokens_like(1, 4)
    named = generate(model, tokens, 3, plans="independent").sequences
    torch.manual_seed(0)
    assert torch.equal(model.generate(tokens, max_new_tokens=9, num_return_sequences=3, do_sample=True), named)
