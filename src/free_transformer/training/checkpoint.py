"""
Checkpoints, from which a run resumes as if it had never stopped, with any number of processes.

Each process writes its own shards with `torch.distributed.checkpoint`, as safetensors, so nothing in a checkpoint is
unpickled. A checkpoint is written to a temporary folder, which is renamed once all files are complete.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from free_transformer.distributed.processes import Processes
from free_transformer.errors import RunError
from free_transformer.files import TEMPORARY, publish_folder, write_json
from free_transformer.settings import SettingsError
from free_transformer.training.checkpoint_contents import (
    STATE,
    UNREADABLE,
    Description,
    TrainState,
    UnusableCheckpoint,
    allocate_optimizer_state,
    cause_of,
    check_optimizers,
    check_shapes,
    describe,
    examine,
    has_only_our_files,
    restore_random_states,
    saved_identity,
    state_tensors,
    unreadable,
)
from free_transformer.training.identity import Change, Identity, check_changes

__all__ = ["CheckpointFailed", "Checkpoints", "TrainState", "UnusableCheckpoint", "list_checkpoints", "load_checkpoint"]

logger = logging.getLogger(__name__)

BEST = "best.json"
MIN_FILE_BYTES, MAX_FILES = 64 * 2**20, 32  # files of a checkpoint are at least this large, or there are this many


class CheckpointFailed(RunError):
    """A checkpoint could not be written. Earlier checkpoints are complete."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return [found[step] for step in sorted(found)]


@dataclass
class Checkpoints:
    """
    The checkpoints of a run, `folder/step-N/`.

    Args:
        keep: number of checkpoints to keep, in addition to the best.
        background: write while training continues.
        identity: identity of the run, which is stored in each checkpoint and compared on loading.
        allowed: names of settings that may differ from a checkpoint even if this changes which text is read.

    Attributes:
        changes: settings that differ from those of the checkpoint that was loaded.
    """

    folder: Path
    keep: int
    processes: Processes = field(default_factory=lambda: Processes(torch.device("cpu")))
    background: bool = False
    identity: Identity | None = None
    allowed: Sequence[str] = ()
    changes: list[Change] = field(default_factory=list, init=False)
    _pending: tuple[Path, Future[None]] | None = field(default=None, init=False)
    _group: dist.ProcessGroup | None = field(default=None, init=False)
    _publisher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)

    def save(self, state: TrainState, best: tuple[float, int] | None = None) -> Path:
        """
        Writes `folder/step-N/`, then deletes old checkpoints. First waits for a checkpoint in the background.

        Args:
            best: held-out loss and step of the best state so far, which is never deleted; `best.json` names it.

        Raises:
            CheckpointFailed: if the checkpoint cannot be written, for example because the disk is full.
        """
        self.wait()
        path = self.folder / f"step-{state.step}"
        temporary = self.folder / f"{TEMPORARY}{path.name}"
        with self._failures_named(path, temporary):
            if self.processes.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self.processes.barrier()
            tensors, alone = state_tensors(state, self.processes), self.processes.size == 1
            files = _file_numbers(tensors, self.processes.size)
            writer = HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
            description = describe(state, self.identity, self.processes.size)
            if self.background:
                if self._group is None and not alone:  # training uses the other groups at the same time
                    self._group = dist.new_group(backend="gloo", timeout=self.processes.timeout)
                with _without_warnings():
                    written = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
                assert isinstance(written, Future)
                publishing = self._publisher.submit(self._publish_when, written, temporary, path, description, best)
                self._pending = (path, publishing)
            else:
                with _without_warnings():
                    dcp.save(tensors, storage_writer=writer, no_dist=alone)
                self._publish(temporary, path, description, best)
        return path

    def wait(self) -> None:
        """Waits until the checkpoint in the background is written. Raises the errors of `save`."""
        if self._pending is not None:
            path, future = self._pending
            self._pending = None
            with self._failures_named(path, self.folder / f"{TEMPORARY}{path.name}"):
                future.result()

    def _publish_when(
        self,
        written: Future,
        temporary: Path,
        path: Path,
        description: Description,
        best: tuple[float, int] | None,
    ) -> None:
        written.result()
        self._publish(temporary, path, description, best)

    def _publish(self, temporary: Path, path: Path, description: Description, best: tuple[float, int] | None) -> None:
        if not self.processes.main:
            return
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / STATE).write_text(json.dumps({**description, "files": sizes}, indent=2) + "\n")
        if path.exists() and not has_only_our_files(path):  # for example a copy made by the user
            path.replace(path.with_name(f"{path.name}-replaced"))
        publish_folder(temporary, path)
        kept = None
        if best is not None:
            kept = self.folder / f"step-{best[1]}"
            write_json(self.folder / BEST, {"checkpoint": kept.name, "loss": best[0]})
        known = [each for each in list_checkpoints(self.folder) if _step(each) <= description["step"] and each != kept]
        for old in known[: -self.keep]:  # later steps belong to another training
            if has_only_our_files(old):
                shutil.rmtree(old.replace(old.with_name(f"{TEMPORARY}old-{old.name}")))

    @contextmanager
    def _failures_named(self, path: Path, temporary: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            if self.processes.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointFailed(
                f"{path}: the checkpoint cannot be written ({cause_of(error)}); earlier checkpoints are complete"
            ) from error

    def load_newest(self, state: TrainState, tell: Callable[[str], None] = logger.warning) -> Path | None:
        """
        Loads the newest usable checkpoint and reports damaged ones through `tell`.

        Returns:
            its path, or None if there are no checkpoints.

        Raises:
            SettingsError: if there are checkpoints but none is usable (with the reason for the newest one), or if the
                newest was trained with settings that this run may not change.
        """
        if self.processes.main and self.folder.is_dir():
            for leftover in self.folder.glob(f"{TEMPORARY}*"):  # left over from a crash
                shutil.rmtree(leftover, ignore_errors=True)
        self.processes.barrier()
        reasons: list[str] = []
        for path in reversed(list_checkpoints(self.folder)):
            try:
                self.load(path, state)
            except UnusableCheckpoint as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                tell(f"{reason}; resuming from {path.name} instead")
            return path
        if reasons:
            others = f" ({len(reasons) - 1} earlier checkpoints are unusable too)" if len(reasons) > 1 else ""
            raise SettingsError(reasons[0] + others)
        return None

    def load(self, path: Path, state: TrainState) -> None:
        """
        Restores a checkpoint. If the settings change the text, the new text is read from its beginning.

        Raises:
            UnusableCheckpoint: in all processes, for a checkpoint that is incomplete, cannot be read, or belongs to
                another model or optimizer.
            SettingsError: for settings that this run may not change.
        """
        problem: SettingsError | None = None
        changes: list[Change] = []
        try:
            description, saved = examine(path)
            if self.identity is not None:
                changes = self.identity.changes(saved_identity(path, description), description["step"])
                check_changes(path, changes, self.allowed)
            check_shapes(path, state.model, saved)
            check_optimizers(path, state, saved)
        except SettingsError as error:
            problem = error
        if self.processes.all_reduce_max(problem is not None) != [0]:  # the others would wait forever
            raise problem or UnusableCheckpoint(f"{path}: another process cannot use it")
        _restore(path, description, saved, state, self.processes)
        if any(change.needs_permission and change.name != "training.seed" for change in changes):
            state.stage_rows = state.rows
        self.changes = changes


def load_checkpoint(path: Path, state: TrainState, processes: Processes | None = None) -> None:
    """Loads a checkpoint without comparing the identity of its run; see `Checkpoints.load`."""
    Checkpoints(path.parent, 1, processes or Processes(torch.device("cpu"))).load(path, state)


def _restore(
    path: Path, description: Description, saved: dict[str, torch.Size], state: TrainState, processes: Processes
) -> None:
    allocate_optimizer_state(state)
    tensors = {name: tensor for name, tensor in state_tensors(state, processes).items() if name in saved}
    try:
        with _without_warnings():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=processes.size == 1)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    restore_random_states(state, processes, tensors, description["processes"])
    state.step, state.rows = description["step"], description["rows"]
    state.stage_rows, state.skipped = description["stage_rows"], description["skipped"]
    scaler = description.get("scaler")
    if state.scaler.is_enabled() and scaler:
        state.scaler.load_state_dict(scaler)


def _file_numbers(tensors: dict[str, Tensor], processes: int) -> dict[str, int]:
    """Assigns each tensor a file number. Files are small because the writer holds two of them in memory."""
    most = max(MIN_FILE_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // MAX_FILES)
    number, held = 1, 0
    numbers = {
        f"random.{rank}.{device}": 1 for rank in range(processes) for device in ("cpu", "cuda")
    }  # includes other processes
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > most:
            number, held = number + 1, 0
        numbers[name] = number
        held += tensor.nbytes
    return numbers


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides the warning of `torch.distributed.checkpoint` about a single process, which appears even with `no_dist`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
