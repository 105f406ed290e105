"""Metrics between two lines of `metrics.jsonl`: accumulated without GPU synchronization, then reduced."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from free_transformer.distributed.processes import Processes
from free_transformer.evaluation.usage import LIVE_BITS

LOSSES = ("loss", "reconstruction", "kl", "hinge", "plans")  # returned by `training_forward`, with kl_per_bit


@dataclass
class MetricAccumulator:
    """
    Values since the last line of metrics, kept as tensors so that the CPU does not wait for the GPU.

    Attributes:
        loss, reconstruction: scalars, one per micro-batch.
        kl, hinge, plans: sums over the plans of this process and the number of plans, one scalar per micro-batch.
        kl_per_bit: (H,) sums over the plans of this process, one per micro-batch.
        gradient_norm: scalars, one per step.
        tokens: number of predicted tokens.
        started: time of the first step, in seconds, from `time.perf_counter`.
    """

    loss: list[Tensor] = field(default_factory=list)
    reconstruction: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    hinge: list[Tensor] = field(default_factory=list)
    kl_per_bit: list[Tensor] = field(default_factory=list)
    plans: list[Tensor] = field(default_factory=list)
    gradient_norm: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds what `training_forward` returns for a micro-batch."""
        for name, value in losses.items():
            getattr(self, name).append(value.detach())

    def extend(self, others: "MetricAccumulator") -> None:
        """Adds all values of a step."""
        for name in (*LOSSES, "kl_per_bit", "gradient_norm"):
            getattr(self, name).extend(getattr(others, name))
        self.tokens += others.tokens

    @property
    def steps(self) -> int:
        return len(self.gradient_norm)

    def has_finite_losses(self) -> bool:
        return bool(torch.stack(self.loss).isfinite().all())

    def has_finite_gradients(self) -> bool:
        return bool(torch.stack(self.gradient_norm).isfinite().all())

    def reduce(self, processes: Processes) -> "ReducedMetrics":
        """Sums the values over all processes. Only this method waits for the GPU."""
        names = [name for name in LOSSES if getattr(self, name)]
        parts = [torch.stack([torch.stack(getattr(self, name)).float() for name in names]).flatten()]
        if self.kl_per_bit:
            parts.append(torch.stack(self.kl_per_bit).float().sum(0))
        values = processes.sum(torch.cat(parts))
        micro = len(self.loss)
        losses = dict(zip(names, values[: len(names) * micro].view(len(names), micro), strict=True))
        norms = torch.stack(self.gradient_norm).float()
        seconds = time.perf_counter() - self.started
        return ReducedMetrics(losses, values[len(names) * micro :].cpu(), norms.cpu(), self.tokens / seconds)


@dataclass
class ReducedMetrics:
    """
    Metrics summed over all processes.

    Attributes:
        losses: values per micro-batch, (micro-batches,), by name.
        kl_per_bit: (H,), sums over all plans; empty for a baseline.
        gradient_norm: norm per step, (steps,).
        tokens_per_second: predicted tokens of all processes per second.
    """

    losses: dict[str, Tensor]
    kl_per_bit: Tensor
    gradient_norm: Tensor
    tokens_per_second: float

    def per_step(self, name: str) -> Tensor:
        """Returns a loss summed over the micro-batches of each step, (steps,)."""
        return self.losses[name].view(len(self.gradient_norm), -1).sum(1).cpu()

    def values(self) -> dict[str, float]:
        """Returns the values of a line of metrics: means over steps, or for the KL, means over plans in bits."""
        norm = self.gradient_norm
        values: dict[str, float] = {name: float(self.per_step(name).mean()) for name in ("loss", "reconstruction")}
        if "kl" in self.losses:
            plans = self.losses["plans"].sum()
            values["kl"] = float((self.losses["kl"] / self.losses["plans"]).mean())
            values["kl_hinge"] = float(self.losses["hinge"].sum() / plans)
            values["live_bits"] = int((self.kl_per_bit > LIVE_BITS * float(plans)).sum())
        return {
            **values,
            "grad_norm": float(norm.mean()),
            "grad_norm_max": float(norm.max()),
            "tokens_per_second": self.tokens_per_second,
        }

    def first_nonfinite(self) -> tuple[int, int, str] | None:
        """Returns step and micro-batch, from 0, and a description of the first NaN or infinite value, or None."""
        steps = len(self.gradient_norm)
        losses = self.losses["loss"].view(steps, -1)
        for step, (of_step, norm) in enumerate(zip(losses, self.gradient_norm, strict=True)):
            if not of_step.isfinite().all():
                micro = int((~of_step.isfinite()).int().argmax())
                return step, step * losses.shape[1] + micro, f"loss is {float(of_step.sum())}"
            if not norm.isfinite():
                return step, step * losses.shape[1], f"gradient's norm is {float(norm)}"
        return None
