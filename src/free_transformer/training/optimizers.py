"""Optimizers and the learning-rate schedule, the same for the Free Transformer and its baseline."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from free_transformer.model import FreeTransformer
from free_transformer.training.settings import SettingsError, TableOptimizer, TrainingSettings

LARGE_TABLE = 2**12  # rows, from which on it pays to leave those alone that were not drawn

NOT_HIDDEN = ("embed_tokens", "lm_head", "encoder.readout")  # matrices that AdamW keeps under Muon
BETAS = (0.9, 0.99)
NEW_PARTS = 10  # times the rate of what is pretrained
FROM_ZERO = 10  # times more for a table that has all its way to go


def build_optimizers(
    model: nn.Module, settings: TrainingSettings, sparse_tables: bool = True
) -> list[torch.optim.Optimizer]:
    """
    AdamW, with weight decay on matrices alone; with `muon`, Muon for the matrices inside the blocks.

    The plan's table has no decay: a row moves only when its code is drawn, and decay would erase the rare ones. With
    `sparse_adam` the other rows are not even read, and the table's gradient becomes a sparse one. Each group keeps its
    peak rate as `peak_lr`.
    """
    muon: list[nn.Parameter] = []
    of_adam: dict[tuple[float, float], list[nn.Parameter]] = {}  # by rate and decay
    table: list[nn.Parameter] = []
    sparse = table_optimizer(model, settings, sparse_tables) == "sparse_adam"
    if isinstance(model, FreeTransformer):
        model.plan_table.sparse = sparse
    rate = settings.learning_rate
    plan_rate, table_rate = plan_rates(model, rate, settings.plan_learning_rate)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "plan_table" in name and sparse:
            table.append(parameter)
        elif "plan_table" in name:
            of_adam.setdefault((table_rate, 0.0), []).append(parameter)
        elif settings.optimizer == "muon" and parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN):
            muon.append(parameter)
        else:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            of_adam.setdefault((plan_rate if name.startswith("encoder.") else rate, decay), []).append(parameter)
    groups = [
        {"params": alike, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in of_adam.items()
        for alike in _by_mesh(parameters)
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=BETAS, fused=True)]
    if muon:
        kind = SharedMuon if any(isinstance(each, DTensor) for each in muon) else torch.optim.Muon
        optimizers.append(kind(muon, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay))
    if table:
        optimizers.append(torch.optim.SparseAdam(table, lr=table_rate, betas=BETAS))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def plan_rates(model: nn.Module, rate: float, plan_rate: float | None = None) -> tuple[float, float]:
    """
    Peak learning rates of the encoder and of the table.

    What a pretrained model does not bring has to learn faster than what it brings. Its table starts at zero and has to
    come to the scale of X, which Adam's steps do not know: its rate is per unit of that scale, and larger still, or the
    text is learned before the plan is of use.
    """
    scale = getattr(model.config, "stream_scale", None)
    if scale is None:
        return (plan_rate or rate,) * 2
    plan_rate = plan_rate or rate * NEW_PARTS
    return plan_rate, plan_rate * FROM_ZERO * scale


def describe_groups(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    """Each group of parameters in words: how many, by which optimizer, at which peak rate and decay."""
    found: dict[tuple[str, float, float], int] = {}
    for optimizer in optimizers:
        name = "Muon" if isinstance(optimizer, torch.optim.Muon) else type(optimizer).__name__
        for group in optimizer.param_groups:
            kind = (name, group["lr"], group.get("weight_decay", 0.0))
            found[kind] = found.get(kind, 0) + sum(parameter.numel() for parameter in group["params"])
    return [
        f"{name} {count:,} parameters at {rate:g}, {f'decay {decay:g}' if decay else 'no decay'}"
        for (name, rate, decay), count in found.items()
    ]


class SharedMuon(torch.optim.Muon):
    """
    `torch.optim.Muon` for matrices that are spread over processes: each is put together and made orthogonal by one.

    As `DTensor` it would be multiplied where it lies, fifteen products in many small messages.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            for start in range(0, len(parameters), dist.get_world_size()):  # a matrix for each process at a time
                self._step_of_each(parameters[start : start + dist.get_world_size()], group)

    def _step_of_each(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        steps = [_whole(self._update(parameter, group)).contiguous() for parameter in parameters]
        if (own := dist.get_rank()) < len(steps):
            steps[own] = self._orthogonal_step(steps[own], group)
        for owner, (parameter, step) in enumerate(zip(parameters, steps, strict=True)):
            dist.broadcast(step, src=owner)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(_spread_like(step, parameter))

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The gradient with momentum, spread as it is."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()

    def _orthogonal_step(self, update: Tensor, group: dict[str, Any]) -> Tensor:
        """What `torch.optim.Muon` would add, found by letting it move a matrix of zeros."""
        zeros = nn.Parameter(torch.zeros_like(update))
        zeros.grad = update
        settings = {name: value for name, value in group.items() if name not in ("params", "peak_lr")}
        torch.optim.Muon([zeros], **{**settings, "weight_decay": 0.0, "momentum": 0.0}).step()
        return zeros.detach()


def _spread_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process holds, cut as `parameter` is; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, everywhere = parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    return DTensor.from_local(whole, mesh, everywhere, run_check=False).redistribute(placements=parameter.placements)


def table_optimizer(model: nn.Module, settings: TrainingSettings, sparse_tables: bool = True) -> TableOptimizer:
    """
    `training.table_optimizer` with `auto` resolved for this model.

    Args:
        sparse_tables: whether gradients may be sparse; those of a model on several processes may not.
    """
    if not isinstance(model, FreeTransformer):
        return "adamw"
    if settings.table_optimizer == "sparse_adam" and not sparse_tables:
        raise SettingsError("training.table_optimizer=sparse_adam: one process alone has it; use adamw, or auto")
    if settings.table_optimizer != "auto":
        return settings.table_optimizer
    return "sparse_adam" if sparse_tables and len(model.plan_table.weight) > LARGE_TABLE else "adamw"


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are sharded alike: PyTorch's operations on lists take no others together."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """
    Scales all gradients so that their norm is at most `max_norm` (0: leaves them), and returns the norm they had.

    `torch.nn.utils.clip_grad_norm_` for gradients of every kind: sparse, and sharded over different meshes.
    """
    groups = _by_mesh(_with_dense_gradient(parameter) for parameter in parameters if parameter.grad is not None)
    norms = [_whole(torch.nn.utils.get_total_norm([each.grad for each in group])) for group in groups]  # type: ignore[misc]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _with_dense_gradient(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or where its gradient is sparse what holds the gradient's values, in the same memory."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()  # a row that was drawn twice stands there once, as a sum
    rows = parameter.grad.values().detach()
    rows.grad = parameter.grad.values()
    return rows  # type: ignore[return-value]


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def learning_rate_scale(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine that ends at `min_lr_ratio` after `max_steps`; a share of the peak."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, settings: TrainingSettings) -> float:
    """Sets the rate of a step in all groups of all optimizers, and returns `learning_rate`'s."""
    scale = learning_rate_scale(step, settings)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
    return settings.learning_rate * scale
