"""Optimizers and the learning-rate schedule, the same for the Free Transformer and its baseline."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from free_transformer.model import FreeTransformer
from free_transformer.training.settings import TableOptimizer, TrainingSettings

LARGE_TABLE = 2**12  # rows, from which on it pays to leave those alone that were not drawn

NOT_HIDDEN = ("embed_tokens", "lm_head", "encoder.readout")  # matrices that AdamW keeps under Muon
BETAS = (0.9, 0.99)


def build_optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """
    AdamW, with weight decay on matrices alone; with `muon`, Muon for the matrices inside the blocks.

    The plan's table has no decay: a row moves only when its code is drawn, and decay would erase the rare ones. With
    `sparse_adam` the other rows are not even read, and the table's gradient becomes a sparse one.
    """
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    table: list[nn.Parameter] = []
    sparse = table_optimizer(model, settings) == "sparse_adam"
    if isinstance(model, FreeTransformer):
        model.plan_table.sparse = sparse
    for name, parameter in model.named_parameters():
        if "plan_table" in name:
            (table if sparse else plain).append(parameter)
        elif settings.optimizer == "muon" and parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN):
            muon.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    rate = settings.learning_rate
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay))
    if table:
        optimizers.append(torch.optim.SparseAdam(table, lr=rate, betas=BETAS))
    return optimizers


def table_optimizer(model: nn.Module, settings: TrainingSettings) -> TableOptimizer:
    """`training.table_optimizer` with `auto` resolved for this model."""
    if not isinstance(model, FreeTransformer):
        return "adamw"
    if settings.table_optimizer != "auto":
        return settings.table_optimizer
    return "sparse_adam" if len(model.plan_table.weight) > LARGE_TABLE else "adamw"


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, which refuses sparse gradients, with those too."""
    clipped = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row that was drawn twice stands there once, as a sum
            rows = parameter.grad.values().detach()
            rows.grad = parameter.grad.values()  # the same memory
            clipped.append(rows)
        else:
            clipped.append(parameter)
    torch.nn.utils.clip_grad_norm_(clipped, max_norm)


def learning_rate_scale(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine that ends at `min_lr_ratio` after `max_steps`; a share of the peak."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, settings: TrainingSettings) -> float:
    """Sets the rate of a step in all optimizers and returns AdamW's."""
    scale = learning_rate_scale(step, settings)
    for optimizer in optimizers:
        muon = isinstance(optimizer, torch.optim.Muon)
        for group in optimizer.param_groups:
            group["lr"] = (settings.muon_learning_rate if muon else settings.learning_rate) * scale
    return settings.learning_rate * scale
