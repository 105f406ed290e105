"""Optimizers and the learning-rate schedule, shared by the Free Transformer and its baseline."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from free_transformer.model.modeling import FreeTransformer
from free_transformer.settings import CodebookOptimizer, Settings

ParameterGroup = dict[str, Any]  # parameters of an optimizer and their settings

LARGE_TABLE = 2**12  # rows; in larger codebooks, only sampled rows are updated

NOT_HIDDEN = ("embed_tokens", "lm_head", "encoder.readout")  # matrices that AdamW optimizes even with Muon
BETAS = (0.9, 0.99)
NEW_PARTS = 10  # multiple of the rate of pretrained weights
FROM_ZERO = 10  # additional factor for a codebook initialized to zero


def build_optimizers(model: nn.Module, settings: Settings, sparse_tables: bool = True) -> list[torch.optim.Optimizer]:
    """
    Builds AdamW, with weight decay only on matrices, and with `muon` also Muon for the matrices inside the blocks.

    The codebook has no decay, because a row has a gradient only when its code is sampled, and decay would erase rare
    codes. With `sparse_adam` the other rows are not updated at all. Each group stores its peak rate as `peak_lr`.

    Args:
        sparse_tables: whether the codebook's gradient is sparse. Sparse gradients cannot be summed across processes.
    """
    muon: list[nn.Parameter] = []
    of_adam: dict[tuple[float, float], list[nn.Parameter]] = {}  # by rate and decay
    table: list[nn.Parameter] = []
    by_row = codebook_optimizer(model, settings) == "sparse_adam"
    if isinstance(model, FreeTransformer):
        model.plan_table.sparse = by_row and sparse_tables
    rate = settings.training.learning_rate
    plan_rate, table_rate = plan_rates(model, rate, settings.optimizer.plan_learning_rate)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "plan_table" in name and by_row:
            table.append(parameter)
        elif "plan_table" in name:
            of_adam.setdefault((table_rate, 0.0), []).append(parameter)
        elif settings.optimizer_name == "muon" and parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN):
            muon.append(parameter)
        else:
            decay = settings.optimizer.weight_decay if parameter.ndim >= 2 else 0.0
            of_adam.setdefault((plan_rate if name.startswith("encoder.") else rate, decay), []).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": alike, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in of_adam.items()
        for alike in _by_mesh(parameters)
    ]
    if table:
        groups.append({"params": table, "lr": table_rate, "weight_decay": 0.0, "by_row": True})
    optimizers: list[torch.optim.Optimizer] = [RowAdamW(groups, betas=BETAS, fused=True)]
    if muon:
        kind = SharedMuon if any(isinstance(each, DTensor) for each in muon) else torch.optim.Muon
        optimizers.append(
            kind(muon, lr=settings.optimizer.muon_learning_rate, weight_decay=settings.optimizer.weight_decay)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def plan_rates(model: nn.Module, rate: float, plan_rate: float | None = None) -> tuple[float, float]:
    """
    Returns the peak learning rates of the encoder and of the codebook.

    New parameters of a pretrained model must learn faster than the others. The codebook is initialized to zero and must
    reach the scale of X, on which Adam's step size does not depend. Its rate is therefore proportional to that scale.
    It is also larger, because otherwise the model learns the text before the plan becomes useful.
    """
    scale = getattr(model.config, "stream_scale", None)
    if scale is None:
        return (plan_rate or rate,) * 2
    plan_rate = plan_rate or rate * NEW_PARTS
    return plan_rate, plan_rate * FROM_ZERO * scale


def describe_groups(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    """Describes each group of parameters: optimizer, number of parameters, peak rate and decay."""
    found: dict[tuple[str, float, float], int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            name = "Muon" if isinstance(optimizer, torch.optim.Muon) else "AdamW"
            if group.get("by_row"):
                name = "AdamW by row"
            kind = (name, group["lr"], group.get("weight_decay", 0.0))
            found[kind] = found.get(kind, 0) + sum(parameter.numel() for parameter in group["params"])
    return [
        f"{name} {count:,} parameters at {rate:g}, {f'decay {decay:g}' if decay else 'no decay'}"
        for (name, rate, decay), count in found.items()
    ]


class RowAdamW(torch.optim.AdamW):
    """
    AdamW that, in groups with `by_row`, updates only the rows that have a gradient, sparse or dense.

    The moments and weights of the other rows do not change: momentum and weight decay apply to a row only in steps in
    which it has a gradient. If every row has a gradient in every step, the update equals AdamW's. On a GPU no step
    synchronizes with the device.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_row = [(each, group) for group in self.param_groups if group.get("by_row") for each in group["params"]]
        gradients = [each.grad for each, _ in by_row]
        for each, _ in by_row:
            each.grad = None  # hidden from AdamW
        super().step()
        for (each, group), gradient in zip(by_row, gradients, strict=True):
            each.grad = gradient
            if gradient is not None:
                self._update_rows(each, gradient, group)
        return loss

    def _update_rows(self, parameter: Tensor, gradient: Tensor, group: ParameterGroup) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        weight, mean, square = (_local(each) for each in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        rows, values, used = _rows_of(_local(gradient))
        if (scale := getattr(self, "grad_scale", None)) is not None:  # both are set by `torch.amp.GradScaler`
            values = values / scale
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            used = used & (found_inf == 0)
            state["step"] += 1 - found_inf
        else:
            state["step"] += 1
        old = [weight[rows], mean[rows], square[rows]]
        first, second = group["betas"]
        new_mean = old[1].lerp(values, 1 - first)
        new_square = old[2].lerp(values.square(), 1 - second)
        # 1 - beta ** step, to float32's precision
        to_mean, to_square = (-torch.expm1(state["step"] * math.log(beta)) for beta in (first, second))
        root = (new_square / to_square).sqrt_().add_(group["eps"])
        update = (new_mean / to_mean).div_(root).add_(old[0], alpha=group["weight_decay"])
        changes = (update.mul_(-group["lr"]), new_mean.sub_(old[1]), new_square.sub_(old[2]))
        for target, change in zip((weight, mean, square), changes, strict=True):
            change = torch.where(used[:, None], change, 0)
            if isinstance(rows, slice):
                target.add_(change)
            else:
                target.index_add_(0, rows, change)


def _rows_of(gradient: Tensor) -> tuple[Tensor | slice, Tensor, Tensor]:
    """Returns the rows that have a gradient, (N,), their gradients, (N, D), and which entries are used, (N,) bool."""
    if gradient.is_sparse:
        return sum_rows(gradient)
    used = gradient.any(1)
    if gradient.is_cuda:  # avoid a synchronization
        return slice(None), gradient, used
    rows = used.nonzero().flatten()
    return rows, gradient[rows], torch.ones_like(rows, dtype=torch.bool)


def sum_rows(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Sums duplicate rows like `coalesce`, but returns as many rows as entries, which avoids a GPU synchronization.

    Returns:
        rows, (N,), their sums, (N, D), and which of the N entries are used, (N,). Unused entries hold zeros for a row
        that appears elsewhere.
    """
    rows, order = gradient._indices()[0].sort(stable=True)
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[1:] = rows[1:] != rows[:-1]
    place = starts.cumsum(0) - 1
    values = gradient._values()[order]
    sums = torch.zeros_like(values).index_add_(0, place, values)
    used = torch.arange(len(rows), device=rows.device) < starts.sum()
    return rows[:1].repeat(len(rows)).scatter(0, place, rows), sums, used


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


class SharedMuon(torch.optim.Muon):
    """
    `torch.optim.Muon` for sharded matrices: one process gathers each matrix and orthogonalizes it.

    Orthogonalizing the `DTensor` itself would take fifteen distributed products with many small messages.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            for start in range(0, len(parameters), dist.get_world_size()):  # one matrix per process at a time
                self._step_of_each(parameters[start : start + dist.get_world_size()], group)

    def _step_of_each(self, parameters: list[nn.Parameter], group: ParameterGroup) -> None:
        steps = [_whole(self._update(parameter, group)).contiguous() for parameter in parameters]
        if (own := dist.get_rank()) < len(steps):
            steps[own] = self._orthogonal_step(steps[own], group)
        for owner, (parameter, step) in enumerate(zip(parameters, steps, strict=True)):
            dist.broadcast(step, src=owner)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(_spread_like(step, parameter))

    def _update(self, parameter: nn.Parameter, group: ParameterGroup) -> Tensor:
        """Returns the gradient with momentum, sharded like the gradient."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()

    def _orthogonal_step(self, update: Tensor, group: ParameterGroup) -> Tensor:
        """Computes the update of `torch.optim.Muon` by applying it to a matrix of zeros."""
        zeros = nn.Parameter(torch.zeros_like(update))
        zeros.grad = update
        settings = {name: value for name, value in group.items() if name not in ("params", "peak_lr")}
        torch.optim.Muon([zeros], **{**settings, "weight_decay": 0.0, "momentum": 0.0}).step()
        return zeros.detach()


def _spread_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Shards a tensor that every process holds like `parameter`, without communication."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, everywhere = parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    return DTensor.from_local(whole, mesh, everywhere, run_check=False).redistribute(placements=parameter.placements)


def codebook_optimizer(model: nn.Module, settings: Settings) -> CodebookOptimizer:
    """Returns `optimizer.codebook` with `auto` resolved for this model."""
    if not isinstance(model, FreeTransformer):
        return "adamw"
    if settings.optimizer.codebook != "auto":
        return settings.optimizer.codebook
    return "sparse_adam" if len(model.plan_table.weight) > LARGE_TABLE else "adamw"


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups parameters by their device mesh, as PyTorch's operations on lists of tensors require."""
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """
    Scales all gradients so that their norm is at most `max_norm` (0: no clipping), and returns their original norm.

    Unlike `torch.nn.utils.clip_grad_norm_`, it supports sparse gradients and gradients on different meshes.
    """
    groups = _by_mesh(_with_dense_gradient(parameter) for parameter in parameters if parameter.grad is not None)
    norms = [
        _whole(torch.nn.utils.get_total_norm([each.grad for each in group if each.grad is not None]))
        for group in groups
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _with_dense_gradient(parameter: nn.Parameter) -> Tensor:
    """Returns the parameter or, if its gradient is sparse, a tensor whose gradient shares the sparse values' memory."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter
    rows, sums, _ = sum_rows(parameter.grad)  # the norm is computed over the sums
    parameter.grad = torch.sparse_coo_tensor(rows[None], sums, parameter.shape, check_invariants=False)
    holder = sums.detach()
    holder.grad = parameter.grad._values()
    return holder


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def learning_rate_scale(step: int, settings: Settings) -> float:
    """Returns the share of the peak rate: linear warm-up, then a cosine to `min_lr_ratio` at `max_steps`."""
    warmup, least = settings.training.warmup_steps, settings.optimizer.min_lr_ratio
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.training.max_steps - warmup)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, settings: Settings) -> float:
    """Sets the rate of a step in all groups of all optimizers, and returns the rate of `training.learning_rate`."""
    scale = learning_rate_scale(step, settings)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
    return settings.training.learning_rate * scale
