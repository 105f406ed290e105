"""Trackers, which send the lines of `metrics.jsonl` to TensorBoard, Weights & Biases and trackio."""

import contextlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Mapping

from free_transformer.files import write_text
from free_transformer.runs.run import Run
from free_transformer.runs.subscribers import MetricsUpdate, MetricValue, Subscriber
from free_transformer.settings import Settings, SettingsError


class Tracker(Subscriber):
    """Base class of trackers, which log numbers and text by name and step."""

    def metrics(self, update: MetricsUpdate) -> None:
        if values := update.values:
            self.log(update.step, {f"{update.split}/{name}": _plain(value) for name, value in values.items()})

    def log(self, step: int, values: Mapping[str, MetricValue]) -> None:
        raise NotImplementedError


def _plain(value: MetricValue) -> MetricValue:
    return value if isinstance(value, str) else float(value)


def open_trackers(run: Run, settings: Settings, resumed: int | None) -> list[Tracker]:
    """
    Opens the trackers that `settings.logging` selects. Skips TensorBoard if it is not installed.

    Args:
        resumed: step of the checkpoint that was loaded, None for a new run.
    """
    logging, trackers = settings.logging, list[Tracker]()
    if logging.tensorboard:
        with contextlib.suppress(ImportError):
            trackers.append(TensorBoard(run, resumed))
    if logging.wandb:
        trackers.append(WandB(run, settings, resumed))
    if logging.trackio:
        trackers.append(Trackio(run, settings, resumed))
    return trackers


def check_trackers(settings: Settings) -> None:
    """Raises `SettingsError` if a selected tracker is not installed."""
    for name in ("wandb", "trackio"):
        if getattr(settings.logging, name) and importlib.util.find_spec(name) is None:
            raise SettingsError(
                f"logging.{name}=true: {name} is not installed; pip install 'free-transformer-lm[{name}]', or set "
                f"logging.{name}=false"
            )


class TensorBoard(Tracker):
    """Logs to TensorBoard. Purges steps after `resumed`, so that no step of an interrupted training is shown twice."""

    def __init__(self, run: Run, resumed: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=(resumed or 0) + 1)

    def log(self, step: int, values: Mapping[str, MetricValue]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """Logs to Weights & Biases, which reads environment variables such as WANDB_MODE and writes to RUN/wandb/."""

    def __init__(self, run: Run, settings: Settings, resumed: int | None):
        import wandb

        name_file = run.path / "wandb_id.txt"  # a resumed run keeps its id, so that W&B shows one run
        if resumed is None or not name_file.is_file():
            write_text(name_file, uuid.uuid4().hex[:8])
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = wandb.init(
            project=settings.logging.project,
            name=run.path.name,
            id=name_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run.path),
            config=settings.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, MetricValue]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Tracker):
    """Logs to trackio, which keeps the numbers on this machine. `trackio show` displays them."""

    def __init__(self, run: Run, settings: Settings, resumed: int | None):
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # keep standard output for the command's own output
            self.run = trackio.init(
                project=settings.logging.project,
                name=run.path.name,
                resume="never" if resumed is None else "allow",
                config=settings.model_dump(mode="json"),
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, MetricValue]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()
