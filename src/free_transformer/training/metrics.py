"""What is added up between two lines of `metrics.jsonl`, and how a step that is no number is found in it."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from free_transformer.distributed.processes import Processes
from free_transformer.evaluation.usage import LIVE_BITS

LOSSES = ("loss", "reconstruction", "kl", "hinge", "plans")  # what `training_forward` returns, besides kl_per_bit


@dataclass
class Totals:
    """Since the last line of metrics, an entry a micro-batch; tensors, so that a GPU need not be waited for."""

    loss: list[Tensor] = field(default_factory=list)
    reconstruction: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)  # of all this process' plans together, as the next three
    hinge: list[Tensor] = field(default_factory=list)
    kl_per_bit: list[Tensor] = field(default_factory=list)  # (H,)
    plans: list[Tensor] = field(default_factory=list)  # their number
    gradient_norm: list[Tensor] = field(default_factory=list)  # an entry a step
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            getattr(self, name).append(value.detach())

    def extend(self, others: "Totals") -> None:
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

    def over(self, processes: Processes) -> "Entries":
        """Of all processes together. The one place where a GPU is waited for."""
        names = [name for name in LOSSES if getattr(self, name)]
        parts = [torch.stack([torch.stack(getattr(self, name)).float() for name in names]).flatten()]
        if self.kl_per_bit:
            parts.append(torch.stack(self.kl_per_bit).float().sum(0))
        values = processes.sum(torch.cat(parts))
        micro = len(self.loss)
        losses = dict(zip(names, values[: len(names) * micro].view(len(names), micro), strict=True))
        norms = torch.stack(self.gradient_norm).float()
        seconds = time.perf_counter() - self.started
        return Entries(losses, values[len(names) * micro :].cpu(), norms.cpu(), self.tokens / seconds)


@dataclass
class Entries:
    """
    Attributes:
        losses: by name, an entry a micro-batch.
        kl_per_bit: (H,), of all plans together; empty for a baseline.
        gradient_norm: an entry a step.
    """

    losses: dict[str, Tensor]
    kl_per_bit: Tensor
    gradient_norm: Tensor
    tokens_per_second: float

    def of_steps(self, name: str) -> Tensor:
        """A loss, its micro-batches added up, an entry a step."""
        return self.losses[name].view(len(self.gradient_norm), -1).sum(1).cpu()

    def values(self) -> dict[str, Any]:
        """As they stand in a line of metrics: means over steps, and over plans what is of plans."""
        norm = self.gradient_norm
        values = {name: float(self.of_steps(name).mean()) for name in ("loss", "reconstruction")}
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

    def first_without_number(self) -> tuple[int, int, str] | None:
        """Step and micro-batch, from 0, and what is no number there; None where all are numbers."""
        steps = len(self.gradient_norm)
        losses = self.losses["loss"].view(steps, -1)
        for step, (of_step, norm) in enumerate(zip(losses, self.gradient_norm, strict=True)):
            if not of_step.isfinite().all():
                micro = int((~of_step.isfinite()).int().argmax())
                return step, step * losses.shape[1] + micro, f"loss is {float(of_step.sum())}"
            if not norm.isfinite():
                return step, step * losses.shape[1], f"gradient's norm is {float(norm)}"
        return None
