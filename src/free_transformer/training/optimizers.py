"""Optimizers and the learning-rate schedule, the same for the Free Transformer and its baseline."""

import math

import torch
from torch import nn

from free_transformer.training.settings import TrainingSettings

NOT_HIDDEN = ("embed_tokens", "lm_head", "plan_table", "encoder.readout")  # matrices that AdamW keeps under Muon


def build_optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """
    AdamW, with weight decay on matrices alone; with `muon`, Muon for the matrices inside the blocks.

    The plan's table has no decay: a row moves only when its code is drawn, and decay would erase the rare ones.
    """
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if settings.optimizer == "muon" and parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN):
            muon.append(parameter)
        elif parameter.ndim >= 2 and "plan_table" not in name:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    ]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay))
    return optimizers


def learning_rate_scale(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine that ends at `min_lr_ratio` after `max_steps`; a share of the peak."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, settings: TrainingSettings) -> float:
    """Sets the rate of a step in all optimizers and returns AdamW's."""
    scale = learning_rate_scale(step, settings)
    peaks = (settings.learning_rate, settings.muon_learning_rate)
    for optimizer, peak in zip(optimizers, peaks, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
    return settings.learning_rate * scale
