"""AdamW of single rows against a loop over rows in float64, and against AdamW where every row has a gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from free_transformer.training.optimizers import RowAdamW, clip_gradients, sum_rows

ROWS, WIDTH, RATE, BETAS, EPS = 9, 3, 0.1, (0.9, 0.99), 1e-8
STEPS = [[4, 1, 4], [1, 1, 1], [7], [4, 7, 0, 0, 4]]  # the rows that each step samples


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.tensor(rows), torch.randn(len(rows), WIDTH, dtype=torch.float64)) for rows in STEPS]


def gradient_of(rows: Tensor, values: Tensor, sparse: bool) -> Tensor:
    found = torch.sparse_coo_tensor(rows[None], values, (ROWS, WIDTH), check_invariants=True)
    return found if sparse else found.to_dense()


def reference(weight: Tensor, decay: float) -> Tensor:
    """Row by row, number by number."""
    weight, mean, square = weight.clone(), torch.zeros(ROWS, WIDTH).double(), torch.zeros(ROWS, WIDTH).double()
    for step, (rows, values) in enumerate(batches(), start=1):
        for row in set(rows.tolist()):
            total = sum(value for at, value in zip(rows.tolist(), values, strict=True) if at == row)
            mean[row] = BETAS[0] * mean[row] + (1 - BETAS[0]) * total
            square[row] = BETAS[1] * square[row] + (1 - BETAS[1]) * total**2
            root = (square[row] / (1 - BETAS[1] ** step)).sqrt() + EPS
            weight[row] -= RATE * (decay * weight[row] + mean[row] / (1 - BETAS[0] ** step) / root)
    return weight


def optimizer_of(weight: Tensor, decay: float = 0.0) -> RowAdamW:
    group = {"params": [weight], "by_row": True, "weight_decay": decay}
    return RowAdamW([group], lr=RATE, betas=BETAS, eps=EPS, fused=True)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("sparse", [True, False])
def test_rows_with_a_gradient_move_as_in_a_loop_over_rows(sparse, decay):
    start = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of(weight, decay)
    for rows, values in batches():
        weight.grad = gradient_of(rows, values, sparse)
        optimizer.step()
    assert_close(weight.detach(), reference(start, decay))
    untouched = sorted(set(range(ROWS)).difference(*STEPS))
    assert torch.equal(weight[untouched], start[untouched])


@pytest.mark.parametrize("sparse", [True, False])
def test_with_a_gradient_for_every_row_it_is_adamw(sparse):
    ours, theirs = (nn.Parameter(torch.ones(ROWS, WIDTH, dtype=torch.float64)) for _ in range(2))
    other = nn.Parameter(torch.ones(2))
    optimizers = [
        RowAdamW([{"params": [ours], "by_row": True}, {"params": [other]}], lr=RATE, weight_decay=0.2, fused=True),
        torch.optim.AdamW([theirs], lr=RATE, weight_decay=0.2),
    ]
    for _ in range(5):
        values = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        ours.grad, theirs.grad = gradient_of(torch.arange(ROWS), values, sparse), values
        for optimizer in optimizers:
            optimizer.step()
    assert_close(ours, theirs)
    assert torch.equal(other, torch.ones(2))


def test_the_update_is_that_of_sparse_adam():
    """Whose learning curves docs/plan-cost.md shows."""
    ours, theirs = (nn.Parameter(torch.ones(ROWS, WIDTH, dtype=torch.float64)) for _ in range(2))
    optimizers = [optimizer_of(ours), torch.optim.SparseAdam([theirs], lr=RATE, betas=BETAS)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["eps"] = 0.0  # SparseAdam adds it before the bias is corrected
    for rows, values in batches():
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient_of(rows, values, sparse=True)
            optimizer.step()
    assert_close(ours, theirs)


def test_state_is_restored_and_training_continues(tmp_path):
    weights = [nn.Parameter(torch.ones(ROWS, WIDTH, dtype=torch.float64)) for _ in range(2)]
    first, second = (optimizer_of(weight) for weight in weights)
    for number, (rows, values) in enumerate(batches()):
        if number == 2:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            weights[1].data.copy_(weights[0].data)
        for weight, optimizer in zip(weights, (first, second), strict=True):
            weight.grad = gradient_of(rows, values, sparse=True)
            if optimizer is first or number >= 2:
                optimizer.step()
    assert torch.equal(*weights)


def test_what_a_loss_scaler_found_is_respected():
    weight = nn.Parameter(torch.ones(ROWS, WIDTH))
    optimizer = optimizer_of(weight)
    weight.grad = torch.sparse_coo_tensor([[2]], [[float("inf")] * WIDTH], (ROWS, WIDTH))
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.full((), 8.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(ROWS, WIDTH))
    assert optimizer.state[weight]["step"] == 0
    weight.grad = torch.sparse_coo_tensor([[2]], [[8.0] * WIDTH], (ROWS, WIDTH))
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert_close(optimizer.state[weight]["exp_avg"][2], torch.full((WIDTH,), 0.1))


def test_sums_of_rows_are_those_of_coalesce():
    rows, values = batches()[3]
    gradient = gradient_of(rows, values, sparse=True)
    found, sums, used = sum_rows(gradient)
    whole = gradient.coalesce()
    assert torch.equal(found[used], whole.indices()[0])
    assert_close(sums[used], whole.values())
    assert not sums[~used].any()
    assert set(found.tolist()) == set(rows.tolist())  # an unused place must not name a row without a gradient


def test_clipping_sees_the_sum_of_a_row_that_was_sampled_twice():
    weight, other = nn.Parameter(torch.ones(ROWS, WIDTH)), nn.Parameter(torch.ones(2))
    weight.grad = torch.sparse_coo_tensor([[1, 1, 3]], torch.ones(3, WIDTH), (ROWS, WIDTH))
    other.grad = torch.full((2,), 2.0)
    assert_close(clip_gradients([weight, other], 1.0), torch.tensor((4 * WIDTH + WIDTH + 8.0) ** 0.5))
    assert_close(torch.cat([weight.grad.to_dense().flatten(), other.grad]).norm(), torch.tensor(1.0))


def without_values(run: Callable[[Tensor], None]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        run(nn.Parameter(torch.empty(ROWS, WIDTH)))


def test_a_step_for_sampled_rows_reads_no_value():
    def run(weight: Tensor) -> None:
        optimizer = optimizer_of(weight)
        for _ in range(2):
            codes = torch.empty(5, dtype=torch.long)
            nn.functional.embedding(codes, weight, sparse=True).sum().backward()
            clip_gradients([weight], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    without_values(run)
