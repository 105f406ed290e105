"""Where the lines of `metrics.jsonl` go besides: TensorBoard, Weights & Biases, trackio."""

import contextlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Mapping
from typing import Protocol

from free_transformer.files import write_text
from free_transformer.runs.run import Run
from free_transformer.settings import Settings, SettingsError


class Tracker(Protocol):
    """Takes numbers, and texts such as advice, by name and step."""

    def log(self, step: int, values: Mapping[str, float | str]) -> None: ...

    def close(self) -> None: ...


def open_trackers(run: Run, settings: Settings, resumed: int | None) -> list[Tracker]:
    """
    Those that `settings.logging` asks for, see `check_trackers`. TensorBoard is left out where it is not installed.

    Args:
        resumed: the step of the checkpoint that was loaded, None for a new run.
    """
    logging, trackers = settings.logging, list[Tracker]()
    if logging.tensorboard:
        with contextlib.suppress(ImportError):
            trackers.append(TensorBoard(run, resumed))
    if logging.wandb:
        trackers.append(WandB(run, settings, resumed is not None))
    if logging.trackio:
        trackers.append(Trackio(run, settings, resumed is not None))
    return trackers


def check_trackers(settings: Settings) -> None:
    """`SettingsError` where one that is asked for is not installed."""
    for name in ("wandb", "trackio"):
        if getattr(settings.logging, name) and importlib.util.find_spec(name) is None:
            raise SettingsError(
                f"logging.{name}=true: {name} is not installed; pip install 'free-transformer-lm[{name}]', or "
                f"logging.{name}=false"
            )


class TensorBoard:
    """Steps after `resumed`, which an interrupted training has logged, are purged, so that none is shown twice."""

    def __init__(self, run: Run, resumed: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=(resumed or 0) + 1)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Its own settings are in the environment, as WANDB_MODE=offline. What it writes here goes to RUN/wandb/."""

    def __init__(self, run: Run, settings: Settings, resumed: bool):
        import wandb

        name_file = run.path / "wandb_id.txt"  # so that a run that goes on is one run there too
        if not resumed or not name_file.is_file():
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

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Keeps the numbers on this machine; `trackio show` shows them."""

    def __init__(self, run: Run, settings: Settings, resumed: bool):
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # standard output is the command's own
            self.run = trackio.init(
                project=settings.logging.project,
                name=run.path.name,
                resume="allow" if resumed else "never",
                config=settings.model_dump(mode="json"),
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()
