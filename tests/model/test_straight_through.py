import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from enumeration import enumerated_gradient, vectors
from free_transformer import BinaryMapper, PlanTable
from free_transformer.model.straight_through import _chunk, _products, exact_gradient, sampled_gradient

GROUPS = [[4], [3, 3], [1, 1, 1], [3, 2], [9], [4, 4, 3]]


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def random_case(group_bits: list[int], plans: tuple[int, ...] = (2, 3), width: int = 5):
    logits = 2 * doubles(*plans, sum(group_bits))
    return doubles(*plans, width), logits, doubles(sum(2**bits for bits in group_bits), width)


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


@pytest.mark.parametrize("chunk_bytes", [0, 500, 3000, 10_000, 2**30])
@pytest.mark.parametrize("group_bits", [[3, 4], [9], [3, 3, 3, 2]])
def test_exact_gradient_does_not_depend_on_the_chunks(group_bits, chunk_bytes):
    grad, logits, weight = random_case(group_bits, plans=(7,))
    whole = exact_gradient(grad, logits, weight, group_bits, 2**40)
    assert_close(exact_gradient(grad, logits, weight, group_bits, chunk_bytes), whole, atol=1e-14, rtol=1e-12)


@given(st.integers(1, 10**6), st.integers(1, 20), st.integers(1, 64), st.integers(2**14, 2**30))
def test_a_chunk_holds_no_more_than_it_may_and_is_no_smaller_than_it_must(plans, bits, groups, values):
    at_a_time, codes = _chunk(plans, bits, groups, values)
    low, high = 2 ** (bits - bits // 2), 2 ** (bits // 2)

    def held(at_a_time, codes):
        return at_a_time * groups * (codes * low + 3 * (low + high))

    assert 1 <= at_a_time <= plans and 1 <= codes <= high
    assert held(at_a_time, codes) <= values or (at_a_time, codes) == (1, 1)
    assert codes == high or held(at_a_time, codes + 1) > values


@pytest.mark.parametrize("chunk_bytes", [2**12, 2**20, 24 * 2**20])
@pytest.mark.parametrize("group_bits", [[16], [12], [8] * 8])
def test_error_of_single_precision_is_small_whatever_the_chunk(group_bits, chunk_bytes):
    grad, logits, weight = random_case(group_bits, plans=(3,), width=16)
    folded = [part.double() for part in (grad, logits, weight)]
    expected, first_bit, first_row = [], 0, 0
    for bits in group_bits:  # groups are independent: 2^8 codes eight times, not 2^64
        rows = folded[2][first_row : first_row + 2**bits]
        expected.append(enumerated_gradient(folded[0], folded[1][:, first_bit : first_bit + bits], rows, [bits]))
        first_bit, first_row = first_bit + bits, first_row + 2**bits
    expected = torch.cat(expected, dim=-1)
    single = exact_gradient(grad.float(), logits.float(), weight.float(), group_bits, chunk_bytes)
    assert single.dtype == torch.float32
    assert (single - expected).norm() <= 1e-5 * expected.norm()


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
        grad.expand(draws, -1), logits.expand(draws, -1), weight, plan, table.group_codes(plan), group_bits, 2**20
    )
    standard_error = estimates.std(0) / draws**0.5
    assert (standard_error > 0).all()
    assert ((estimates.mean(0) - expected[0]).abs() < 5 * standard_error).all()


def test_sampled_gradient_of_one_bit_a_group_is_exact():
    group_bits = [1, 1, 1]
    grad, logits, weight = random_case(group_bits)
    plan = BinaryMapper()(logits)
    codes = PlanTable(group_bits, weight.shape[1]).group_codes(plan)
    estimate = sampled_gradient(grad, logits, weight, plan, codes, group_bits, 2**20)
    assert_close(estimate, enumerated_gradient(grad, logits, weight, group_bits))


def test_sampled_gradient_is_what_the_table_passes_on():
    group_bits = [3, 3]
    grad, logits, weight = random_case(group_bits)
    table = PlanTable(group_bits, weight.shape[1], gradient="sampled").double()
    table.weight.data.copy_(weight)
    plan = BinaryMapper()(logits)
    expected = sampled_gradient(grad, logits, weight, plan, table.group_codes(plan), group_bits, 2**20)
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


@pytest.mark.parametrize("group_bits", [[6], [3, 3, 2]])
def test_sampled_gradient_is_the_same_with_and_without_a_copy_of_the_rows(group_bits):
    grad, _, weight = (part.bfloat16() for part in random_case(group_bits, plans=(7,)))
    codes = torch.randint(0, len(weight), (7, 5))
    expected = (weight.double()[codes] * grad.double()[:, None]).sum(-1)
    for chunk_bytes in (0, 100, 2**20):
        assert_close(_products(grad.float(), weight, codes, chunk_bytes).double(), expected, atol=1e-5, rtol=1e-5)
    assert_close(_products(grad.double(), weight.double(), codes, 0), expected)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_gradients_stay_in_full_precision_under_autocast(gradient):
    table = PlanTable([4, 4], 5, gradient=gradient)
    logits, grad = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 5)
    plan = BinaryMapper()(logits.detach())
    table(plan, logits).backward(grad)
    expected, logits.grad = logits.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table(plan, logits).backward(grad)
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_the_table_changes_no_gradient(gradient, reentrant):
    grads = []
    logits = torch.randn(2, 3, 8)
    plan = BinaryMapper()(logits)
    for recompute in (False, True):
        torch.manual_seed(1)
        table = PlanTable([4, 4], 5, gradient=gradient)
        asked = logits.clone().requires_grad_()
        states = checkpoint(table, plan, asked, use_reentrant=reentrant) if recompute else table(plan, asked)
        states.square().sum().backward()
        grads.append((asked.grad, table.weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize(("gradient", "sparse"), [("exact", False), ("sampled", False), ("sampled", True)])
def test_compiled_table_is_one_graph_with_the_same_gradients(gradient, sparse):
    table = PlanTable([4, 3], 5, gradient=gradient, chunk_bytes=1000)
    table.sparse = sparse
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    for plans in (3, 5):  # another number of plans is another number of chunks, which the graph must not know
        logits = torch.randn(2, plans, 7, requires_grad=True)
        plan = BinaryMapper()(logits.detach())
        grads = []
        for module in (table, compiled):
            logits.grad = table.weight.grad = None
            module(plan, logits).square().sum().backward()
            grads.append((logits.grad, table.weight.grad))
        assert_close(grads[0][0], grads[1][0])
        assert_close(*(grad[1].to_dense() if sparse else grad[1] for grad in grads))


def test_operators_keep_the_rules_of_custom_operators():
    group_bits = [3, 2]
    grad, logits, weight = random_case(group_bits)
    plan = BinaryMapper()(logits)
    codes = PlanTable(group_bits, 5).group_codes(plan)
    torch.library.opcheck(exact_gradient, (grad, logits, weight, group_bits, 1000))
    torch.library.opcheck(sampled_gradient, (grad, logits, weight, plan, codes, group_bits, 1000))


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_sparse_gradient_of_the_table_is_the_dense_one_over_micro_batches(gradient):
    group_bits = [6, 6]
    dense, sparse = (PlanTable(group_bits, 5, gradient=gradient).double() for _ in range(2))
    sparse.weight.data.copy_(dense.weight)
    sparse.sparse = True
    for _ in range(3):
        grad, logits, _ = random_case(group_bits)
        plan = BinaryMapper()(logits)
        for table in (dense, sparse):
            table(plan, logits.clone().requires_grad_()).backward(grad)
    assert sparse.weight.grad.is_sparse
    assert sparse.weight.grad.coalesce().indices().shape[1] <= 3 * 6 * 2  # only sampled rows
    assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
