import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from enumeration import all_plans, vectors
from free_transformer import (
    BinaryMapper,
    FreeTransformer,
    FreeTransformerConfig,
    PlanTable,
    bits_to_codes,
    codes_to_bits,
)

GROUPS = [[4], [3, 3], [1, 1, 1], [3, 2]]


@given(st.integers(1, 63).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 2**n - 1), max_size=5))))
@example((63, [0, 2**63 - 1]))
def test_codes_to_bits_and_back(case):
    num_bits, codes = case
    codes = torch.tensor(codes, dtype=torch.int64)
    bits = codes_to_bits(codes, num_bits)
    assert bits.shape == (*codes.shape, num_bits)
    assert bits.dtype == torch.bool
    assert torch.equal(bits_to_codes(bits), codes)


@given(st.lists(st.booleans(), min_size=1, max_size=63))
def test_bits_to_codes_and_back(bits):
    bits = torch.tensor([bits])
    code = bits_to_codes(bits)
    assert code.item() == sum(2**h for h, bit in enumerate(bits[0].tolist()) if bit)
    assert torch.equal(codes_to_bits(code, bits.shape[1]), bits)
    assert torch.equal(bits_to_codes(bits.int()), code)


@pytest.mark.parametrize(("codes", "num_bits"), [([0, 8], 3), ([-1], 3), ([0], 64)])
def test_codes_that_do_not_fit_are_refused(codes, num_bits):
    with pytest.raises(ValueError, match=r"bits (hold|do not fit)"):
        codes_to_bits(torch.tensor(codes), num_bits)


def test_more_bits_than_an_integer_holds_are_refused():
    with pytest.raises(ValueError, match="64 bits do not fit"):
        bits_to_codes(torch.ones(2, 64, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_are_sampled_with_the_probabilities_of_their_logits(dtype):
    draws = 20_000
    logits = torch.tensor([-80.0, -3.0, -0.5, 0.0, 1.0, 4.0, 80.0], dtype=dtype)
    bits = BinaryMapper()(logits.expand(draws, -1))
    p = logits.double().sigmoid()
    assert bits.dtype == torch.bool
    assert ((bits.double().mean(0) - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-12).all()


def test_bits_are_sampled_independently():
    signs = BinaryMapper()(torch.zeros(20_000, 6)).double() * 2 - 1
    covariance = signs.T @ signs / len(signs)
    assert_close(covariance, torch.eye(6, dtype=torch.float64), atol=5 / len(signs) ** 0.5, rtol=0)


def test_draws_repeat_under_a_generator_of_the_same_seed():
    first, second = (BinaryMapper()(torch.zeros(4, 8), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_vector_of_a_plan_of_one_group_is_the_row_of_its_code():
    table = PlanTable([4], 5, start="normal")
    plans = all_plans(4)[None]
    assert torch.equal(table(plans), table.weight[bits_to_codes(plans)])
    assert torch.equal(table(plans)[0], table.weight)


@pytest.mark.parametrize("group_bits", GROUPS)
def test_vector_of_a_plan_is_the_sum_over_its_groups(group_bits):
    table = PlanTable(group_bits, 5, start="normal").double()
    plans = all_plans(sum(group_bits))
    assert table.weight.shape == (sum(2**bits for bits in group_bits), 5)
    assert_close(table(plans[None])[0], vectors(table.weight, group_bits, plans))


@pytest.mark.parametrize("group_bits", [[6], [3, 3], [4, 2], [1] * 6])
def test_bit_linear_start_adds_or_subtracts_one_vector_a_bit_at_unit_scale(group_bits):
    table = PlanTable(group_bits, 512)
    plans = all_plans(6)
    states = table(plans[None])[0].double()
    signs = plans.double() * 2 - 1
    directions = signs.T @ states / len(plans)  # the least squares fit, signs being orthogonal
    assert_close(signs @ directions, states, atol=1e-5, rtol=0)
    assert_close(states.square().mean().sqrt().item(), 1.0, atol=0.1, rtol=0)
    assert_close(directions.square().mean(1).sqrt(), torch.full((6,), 6**-0.5).double(), atol=0.1, rtol=0)


@pytest.mark.parametrize("group_bits", [[6], [3, 3]])
def test_normal_start_has_unit_scale_and_zero_start_is_zero(group_bits):
    rms = PlanTable(group_bits, 512, start="normal")(all_plans(6)[None]).square().mean().sqrt()
    assert_close(rms.item(), 1.0, atol=0.1, rtol=0)
    assert not PlanTable(group_bits, 8, start="zero").weight.any()


@pytest.mark.parametrize("latent_dim", range(1, 65))
@pytest.mark.parametrize("code_bits", [1, 8])
def test_every_length_of_plan_finds_its_rows(tiny_config, latent_dim, code_bits):
    config = tiny_config(latent_dim=latent_dim, code_bits=code_bits)
    table = PlanTable(config.group_bits, 4)
    plans = torch.stack([torch.zeros(latent_dim), torch.ones(latent_dim), torch.rand(latent_dim).round()]).bool()
    codes = table.group_codes(plans)
    last_rows = torch.tensor(config.group_bits).exp2().long().cumsum(0)
    assert torch.equal(codes[0], torch.cat([torch.zeros(1).long(), last_rows[:-1]]))
    assert torch.equal(codes[1], last_rows - 1)
    assert last_rows[-1] == len(table.weight)
    assert_close(table(plans[None])[0], vectors(table.weight, config.group_bits, plans))


@pytest.mark.parametrize("names", [{"0110": "0110"}, {" ": "0110"}, {"calm": "011"}, {"calm": "wild"}])
def test_names_of_plans_are_checked(names):
    with pytest.raises(ValueError, match="plan"):
        FreeTransformerConfig(latent_dim=4, plan_names=names)


def test_names_of_plans_are_saved_and_used(tmp_path):
    model = FreeTransformer(
        FreeTransformerConfig(hidden_dim=16, num_layers=2, latent_dim=4, plan_names={"calm": "0110"})
    )
    model.save_pretrained(tmp_path)
    loaded = FreeTransformer.from_pretrained(tmp_path)
    tokens = torch.randint(0, 256, (1, 5))
    assert torch.equal(loaded(tokens, plan="calm").plan, torch.tensor([[[False, True, True, False]]]))
    with pytest.raises(ValueError, match=r"plan 'clam' is neither bits .* nor a known name, such as calm"):
        loaded(tokens, plan="clam")
