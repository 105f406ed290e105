"""What a person sees of a run while it trains, and what is written down: bar, lines, TensorBoard, metrics.jsonl."""

import contextlib
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from free_transformer.data import Rows
from free_transformer.training.processes import Processes
from free_transformer.training.run import Run
from free_transformer.training.settings import DistributedSettings, Settings

LINES_WITHOUT_A_TERMINAL = 10


class Display:
    """One place for every number of a run. `with Display(...) as display:`"""

    def __init__(self, run: Run, settings: Settings, processes: Processes, quiet: bool = False):
        self.run, self.settings, self.processes = run, settings, processes
        quiet = quiet or not processes.main
        self.console = Console(quiet=quiet, stderr=True)
        self.writer = self._tensorboard()
        self.name = escape(run.path.name)
        self.collapsed = False
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task(self.name, total=settings.training.max_steps, numbers="")

    def _tensorboard(self) -> Any:
        if not self.settings.logging.tensorboard or not self.processes.main:
            return None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(str(self.run.path / "tensorboard"))
        return None

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()
        if kind is None:
            self.console.print(f"trained: {self.run.path}", highlight=False, soft_wrap=True)

    def start(self, model: Any, step: int, data: Any) -> None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        text = f"{self.run.path.name}: {parameters / 1e6:.2f} M parameters"
        if isinstance(data, Rows):
            text += f", {len(data)} rows of {data.tokens.shape[1]} tokens"
        if step >= self.settings.training.max_steps:
            text += f"; trained to step {step} already (raise training.max_steps to go on)"
        elif step:
            text += f", resumed at step {step}"
        self.console.print(text, highlight=False)
        if note := _note_on_processes(self.processes, self.settings.distributed):
            self.console.print(note, highlight=False)
        self.progress.update(self.task, completed=step)

    def log(self, step: int, split: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the same numbers to TensorBoard, and the bar."""
        if not self.processes.main:
            return
        values = {name: value for name, value in values.items() if value is not None}
        self.run.append_metrics(step=step, split=split, **values)
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{split}/{name}", value, step)
        numbers = _numbers(values)
        if split == "train":
            self.progress.update(self.task, completed=step, numbers=numbers)
        if split == "validation" or (self.progress.disable and self._milestone(step)):
            self.console.print(f"step {step} {split}: {numbers}", highlight=False)

    def watch(self, step: int, warning: str | None) -> None:
        """What the watcher says of the plan: into the bar, the console and metrics.jsonl, when it changes."""
        if not self.processes.main:
            return
        self.run.append_metrics(step=step, split="watcher", collapsed=warning is not None, warning=warning)
        if self.writer is not None:
            self.writer.add_scalar("watcher/collapsed", float(warning is not None), step)
        self.progress.update(self.task, description=f"{self.name} [red]collapsed[/]" if warning else self.name)
        if warning and not self.collapsed:
            self.console.print(f"step {step} collapsed: {warning}", style="yellow", highlight=False, markup=False)
        elif self.collapsed and not warning:
            self.console.print(f"step {step}: the plan is used now", highlight=False)
        self.collapsed = warning is not None

    def skip(self, step: int) -> None:
        """A step that was left out, since its loss or gradient is no number."""
        if self.processes.main:
            self.run.append_metrics(step=step, split="skipped")
        self.warn(f"step {step} is left out: its loss or gradient is no number")

    def stopped(self, step: int, signal_name: str) -> None:
        text = f"stopped by {signal_name} at step {step}, saved in {self.run.checkpoints}; the same command goes on"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def sample(self, step: int, text: str) -> None:
        self.console.print(f"[dim]step {step} writes:[/] {escape(text)!r}", highlight=False)

    def _milestone(self, step: int) -> bool:
        every = max(1, self.settings.training.max_steps // LINES_WITHOUT_A_TERMINAL)
        return step // every != (step - self.settings.training.log_every) // every


def _note_on_processes(processes: Processes, settings: DistributedSettings) -> str:
    """Who shares the work and how, and what to do where nobody does or it will not be fast."""
    if processes.size == 1:
        return "fsdp: one process, nothing to shard; start more with torchrun --nproc_per_node=auto" * settings.fsdp
    data, tensor = processes.data_size, processes.tensor
    replicas = settings.replicas if settings.fsdp else data
    text = f"{processes.size} processes on {processes.device.type}: "
    text += f"{data} share each batch" if tensor == 1 else f"{data} x {tensor}, data x tensor"
    text += f", the model sharded over {data // replicas}" if data > replicas else ", each with the whole model"
    if processes.device.type == "cpu":
        text += " (gloo: to try a run out; one process is seldom slower on one machine's CPU)"
    return text


def _numbers(values: dict[str, Any]) -> str:
    parts = [f"reconstruction {values['reconstruction']:.3f}" if "reconstruction" in values else ""]
    parts.append(f"KL {values['kl']:.2f} bits" if "kl" in values else "")
    parts += [f"{name} {values[name]:.3f}" for name in ("elbo", "nll", "prior") if name in values]
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in values else "")
    return ", ".join(part for part in parts if part)
