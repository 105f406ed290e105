import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from free_transformer import BinaryMapper, PlanTable, bits_to_codes, codes_to_bits
from free_transformer.plan import exact_gradient, sampled_gradient

GROUPS = [[4], [3, 3], [1, 1, 1], [3, 2]]


def all_plans(num_bits: int) -> torch.Tensor:
    return codes_to_bits(torch.arange(2**num_bits), num_bits)


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def vectors(weight: torch.Tensor, group_bits: list[int], plans: torch.Tensor) -> torch.Tensor:
    """The plans' vectors, group by group, row by row: (N, H) -> (N, D)."""
    total, first_bit, first_row = 0, 0, 0
    for bits in group_bits:
        codes = sum(plans[:, first_bit + h].long() << h for h in range(bits))
        total = total + weight[first_row + codes]
        first_bit, first_row = first_bit + bits, first_row + 2**bits
    return total


def enumerated_gradient(
    grad: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor, group_bits: list[int]
) -> torch.Tensor:
    """∂/∂logits of Σ_z Q(z) grad · table[z], by autograd in float64 through the product of the probabilities."""
    logits = logits.detach().double().requires_grad_()
    plans = all_plans(sum(group_bits))  # (2^H, H)
    p = logits.sigmoid()[..., None, :]
    q = torch.where(plans, p, 1 - p).prod(-1)  # (..., 2^H)
    values = grad.double() @ vectors(weight.detach().double(), group_bits, plans).T
    return torch.autograd.grad((q * values).sum(), logits)[0]


def random_case(group_bits: list[int], plans: tuple[int, ...] = (2, 3), width: int = 5):
    logits = 2 * doubles(*plans, sum(group_bits))
    return doubles(*plans, width), logits, doubles(sum(2**bits for bits in group_bits), width)


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
def test_bits_are_drawn_with_the_probabilities_of_their_logits(dtype):
    draws = 20_000
    logits = torch.tensor([-80.0, -3.0, -0.5, 0.0, 1.0, 4.0, 80.0], dtype=dtype)
    bits = BinaryMapper()(logits.expand(draws, -1))
    p = logits.double().sigmoid()
    assert bits.dtype == torch.bool
    assert ((bits.double().mean(0) - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-12).all()


def test_bits_are_drawn_independently_of_each_other():
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


@pytest.mark.parametrize("group_bits", GROUPS)
def test_exact_gradient_at_the_logits_is_the_enumerated_one(group_bits):
    grad, logits, weight = random_case(group_bits)
    expected = enumerated_gradient(grad, logits, weight, group_bits)
    assert_close(exact_gradient(grad, logits, weight, group_bits, 2**20), expected)

    table = PlanTable(group_bits, weight.shape[1], gradient="exact").double()
    table.weight.data.copy_(weight)
    logits.requires_grad_()
    (table(BinaryMapper()(logits.detach()), logits) * grad).sum().backward()
    assert_close(logits.grad, expected)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_vectors_are_the_same_with_and_without_the_straight_through_gradient(gradient):
    table = PlanTable([3, 3], 5, gradient=gradient)
    logits = torch.randn(2, 4, 6)
    plan = BinaryMapper()(logits)
    assert torch.equal(table(plan, logits.requires_grad_()), table(plan))


@pytest.mark.parametrize("plans_at_a_time", [0, 1, 3, 7])
def test_exact_gradient_does_not_depend_on_the_chunks(plans_at_a_time):
    group_bits = [3, 4]
    grad, logits, weight = random_case(group_bits, plans=(7,))
    chunk_bytes = plans_at_a_time * 3 * 16 * 8
    whole = exact_gradient(grad, logits, weight, group_bits, 2**30)
    assert_close(exact_gradient(grad, logits, weight, group_bits, chunk_bytes), whole, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_gradients_are_finite_where_the_posterior_is_certain(gradient, dtype):
    table = PlanTable([4], 5, gradient=gradient).to(dtype)
    logits = torch.tensor([80.0, -80.0, 0.0, 80.0], dtype=dtype).expand(1, 3, 4).clone().requires_grad_()
    table(BinaryMapper()(logits.detach()), logits).sum().backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()
    assert table.weight.grad.isfinite().all()
    assert not logits.grad[..., [0, 1, 3]].abs().gt(1e-6).any()
    assert logits.grad[..., 2].abs().gt(1e-3).all()


@pytest.mark.parametrize("group_bits", [[6], [3, 3]])
def test_exact_gradient_of_half_precision_tensors_is_computed_in_full_precision(group_bits):
    grad, logits, weight = (part.bfloat16() for part in random_case(group_bits))
    expected = enumerated_gradient(grad, logits, weight, group_bits)
    exact = exact_gradient(grad, logits, weight, group_bits, 2**20)
    assert exact.dtype == torch.float32
    assert_close(exact.double(), expected, atol=1e-6, rtol=1e-4)

    table = PlanTable(group_bits, weight.shape[1]).bfloat16()
    table.weight.data.copy_(weight)
    logits.requires_grad_()
    states = table(BinaryMapper()(logits.detach()), logits)
    states.backward(grad)
    assert_close(logits.grad.double(), expected, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("group_bits", [[4], [3, 3]])
def test_sampled_gradient_is_unbiased(group_bits):
    draws = 20_000
    grad, logits, weight = random_case(group_bits, plans=(1,))
    expected = enumerated_gradient(grad, logits, weight, group_bits)
    table = PlanTable(group_bits, weight.shape[1])
    plan = BinaryMapper()(logits.expand(draws, -1))
    estimates = sampled_gradient(
        grad.expand(draws, -1), logits.expand(draws, -1), weight, group_bits, plan, table.group_codes(plan)
    )
    standard_error = estimates.std(0) / draws**0.5
    assert (standard_error > 0).all()
    assert ((estimates.mean(0) - expected[0]).abs() < 5 * standard_error).all()


def test_sampled_gradient_of_one_bit_a_group_is_exact():
    group_bits = [1, 1, 1]
    grad, logits, weight = random_case(group_bits)
    plan = BinaryMapper()(logits)
    codes = PlanTable(group_bits, weight.shape[1]).group_codes(plan)
    estimate = sampled_gradient(grad, logits, weight, group_bits, plan, codes)
    assert_close(estimate, enumerated_gradient(grad, logits, weight, group_bits))


def test_sampled_gradient_is_what_the_table_passes_on():
    group_bits = [3, 3]
    grad, logits, weight = random_case(group_bits)
    table = PlanTable(group_bits, weight.shape[1], gradient="sampled").double()
    table.weight.data.copy_(weight)
    plan = BinaryMapper()(logits)
    expected = sampled_gradient(grad, logits, weight, group_bits, plan, table.group_codes(plan))
    logits.requires_grad_()
    table(plan, logits).backward(grad)
    assert_close(logits.grad, expected)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("group_bits", [[4], [3, 3]])
def test_table_gradient_is_that_of_a_lookup(group_bits, gradient):
    grad, logits, weight = random_case(group_bits)
    table = PlanTable(group_bits, weight.shape[1], gradient=gradient).double()
    plan = BinaryMapper()(logits)
    lookup = weight.clone().requires_grad_()
    vectors(lookup, group_bits, plan.flatten(0, 1)).backward(grad.flatten(0, 1))
    table(plan, logits.requires_grad_()).backward(grad)
    assert_close(table.weight.grad, lookup.grad)
    drawn = torch.zeros(len(weight), dtype=torch.bool)
    drawn[table.group_codes(plan).flatten()] = True
    assert torch.equal(table.weight.grad.any(1), drawn)
