"""
Checkpoints: all that a run needs to go on as if it had never stopped, whatever the number of its processes.

Written by `torch.distributed.checkpoint`, each process its own shards, as safetensors: nothing in a checkpoint is
ever unpickled. A checkpoint is a folder that takes its name when all of it is on the disk.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from free_transformer.distributed.parallelize import SharedBinaryMapper, random_state
from free_transformer.distributed.processes import Processes
from free_transformer.errors import RunError
from free_transformer.files import TEMPORARY, first_line, publish_folder, write_json
from free_transformer.settings import SettingsError
from free_transformer.training.identity import Change, Identity, check_changes

logger = logging.getLogger(__name__)

STATE = "state.json"
BEST = "best.json"
MIN_FILE_BYTES, MAX_FILES = 64 * 2**20, 32  # bytes of a file of a checkpoint, unless there would be more files
FORMAT = 2  # of state.json: positions in the data are counted in rows, and what the run is stands beside them
COUNTS = ("step", "rows", "stage_rows", "skipped")
OF_ADAM = {"step", "exp_avg", "exp_avg_sq"}
OF_MUON = {"momentum_buffer"}
UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, CheckpointException)


class CheckpointFailed(RunError):
    """A checkpoint that could not be written; those before it are as they were."""


class UnusableCheckpoint(SettingsError):
    """A checkpoint that is damaged or of something else; an older one may do."""


@dataclass
class TrainState:
    """What a checkpoint holds, besides random states; the learning rate and the schedules follow from the step."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    adapters: Any = None  # PEFT's tuner, where adapters learn in the place of the decoder's weights
    step: int = 0
    rows: int = 0  # read from the training text by all processes: the position in the data
    stage_rows: int = 0  # of them, those that stages with other text had read before
    skipped: int = 0  # steps that were left out because a loss or gradient was NaN or infinite


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return [found[step] for step in sorted(found)]


@dataclass
class Checkpoints:
    """
    The checkpoints of a run, `folder/step-N/`.

    Args:
        keep: how many stay, besides the best.
        background: write while training goes on.
        identity: what the run is, recorded in each checkpoint and compared when one is loaded.
        allowed: names of settings that may differ from a checkpoint's although that changes the text that is read.

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
    _pending: tuple[Path, Future] | None = field(default=None, init=False)
    _group: Any = field(default=None, init=False)
    _publisher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)

    def save(self, state: TrainState, best: tuple[float, int] | None = None) -> Path:
        """
        Writes `folder/step-N/`, then drops all but the newest. In the background, the one before is waited for.

        Args:
            best: held-out loss and step of the best state so far, which is never dropped; `best.json` names it.

        Raises:
            CheckpointFailed: where it cannot be written, such as on a full disk.
        """
        self.wait()
        path = self.folder / f"step-{state.step}"
        temporary = self.folder / f"{TEMPORARY}{path.name}"
        with self._failures_named(path, temporary):
            if self.processes.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self.processes.barrier()
            tensors, alone = _tensors(state, self.processes), self.processes.size == 1
            files = _file_numbers(tensors, self.processes.size)
            writer = HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
            facts = {name: getattr(state, name) for name in COUNTS}
            facts |= {"format": FORMAT, "processes": self.processes.size, "scaler": state.scaler.state_dict()}
            facts["identity"] = self.identity and self.identity.to_json()
            if self.background:
                if self._group is None and not alone:  # its own, since training talks meanwhile
                    self._group = dist.new_group(backend="gloo", timeout=self.processes.timeout)
                with _quiet():
                    written = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
                self._pending = (
                    path,
                    self._publisher.submit(self._publish_when, written, temporary, path, facts, best),
                )
            else:
                with _quiet():
                    dcp.save(tensors, storage_writer=writer, no_dist=alone)
                self._publish(temporary, path, facts, best)
        return path

    def wait(self) -> None:
        """Until what is written in the background is on the disk; `CheckpointFailed` as in `save`."""
        if self._pending is not None:
            path, future = self._pending
            self._pending = None
            with self._failures_named(path, self.folder / f"{TEMPORARY}{path.name}"):
                future.result()

    def _publish_when(self, written: Any, *arguments: Any) -> None:
        written.result()
        self._publish(*arguments)

    def _publish(self, temporary: Path, path: Path, facts: dict[str, Any], best: tuple[float, int] | None) -> None:
        if not self.processes.main:
            return
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / STATE).write_text(json.dumps({**facts, "files": sizes}, indent=2) + "\n")
        if path.exists() and not _is_ours(path):  # such as a copy that somebody put there
            path.replace(path.with_name(f"{path.name}-replaced"))
        publish_folder(temporary, path)
        kept = None
        if best is not None:
            kept = self.folder / f"step-{best[1]}"
            write_json(self.folder / BEST, {"checkpoint": kept.name, "loss": best[0]})
        known = [each for each in list_checkpoints(self.folder) if _step(each) <= facts["step"] and each != kept]
        for old in known[: -self.keep]:  # one with a later step is not of this run, and not ours to delete
            if _is_ours(old):
                shutil.rmtree(old.replace(old.with_name(f"{TEMPORARY}old-{old.name}")))

    @contextmanager
    def _failures_named(self, path: Path, temporary: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            if self.processes.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointFailed(
                f"{path}: the checkpoint cannot be written ({_cause(error)}); those before it are whole"
            ) from error

    def load_newest(self, state: TrainState, tell: Callable[[str], None] = logger.warning) -> Path | None:
        """
        The newest checkpoint that can be used, or None where there is none. Damaged ones are named through `tell`.

        Raises:
            SettingsError: where there are checkpoints and none of them can be used; the newest one's reason. Also
                where the newest was trained with settings that this run may not change.
        """
        if self.processes.main and self.folder.is_dir():
            for leftover in self.folder.glob(f"{TEMPORARY}*"):  # of a crash
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
            others = f" (nor can the {len(reasons) - 1} before it be used)" if len(reasons) > 1 else ""
            raise SettingsError(reasons[0] + others)
        return None

    def load(self, path: Path, state: TrainState) -> None:
        """
        Restores a checkpoint. Text that a changed setting brings is read from its beginning.

        Raises:
            UnusableCheckpoint: for one that is cut short, cannot be read, or is of another model or optimizer, in all
                processes if in one.
            SettingsError: for settings that this run may not change.
        """
        problem: SettingsError | None = None
        changes: list[Change] = []
        try:
            facts, saved = _examine(path)
            if self.identity is not None:
                changes = self.identity.changes(_identity(path, facts), facts["step"])
                check_changes(path, changes, self.allowed)
            _check_shapes(path, state.model, saved)
            _check_optimizers(path, state, saved)
        except SettingsError as error:
            problem = error
        if self.processes.all_reduce_max(problem is not None) != [0]:  # those that go on would wait for the others
            raise problem or UnusableCheckpoint(f"{path}: another process cannot use it")
        _restore(path, facts, saved, state, self.processes)
        if any(change.needs_permission and change.name != "training.seed" for change in changes):
            state.stage_rows = state.rows
        self.changes = changes


def load_checkpoint(path: Path, state: TrainState, processes: Processes | None = None) -> None:
    """`Checkpoints.load` of one checkpoint, whatever its run is."""
    Checkpoints(path.parent, 1, processes or Processes(torch.device("cpu"))).load(path, state)


def _restore(
    path: Path, facts: dict[str, Any], saved: dict[str, torch.Size], state: TrainState, processes: Processes
) -> None:
    _make_room(state)
    tensors = {name: tensor for name, tensor in _tensors(state, processes).items() if name in saved}
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=processes.size == 1)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    _restore_randomness(state, processes, tensors, facts["processes"])
    for name in COUNTS:
        setattr(state, name, facts[name])
    if state.scaler.is_enabled() and facts.get("scaler"):
        state.scaler.load_state_dict(facts["scaler"])


def _examine(path: Path) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """What a checkpoint says of itself, and the shapes of what it holds. `SettingsError` where a file is not whole."""
    try:
        facts = json.loads((path / STATE).read_text(encoding="utf-8"))
        if "files" in facts and facts.get("format") != FORMAT:
            raise UnusableCheckpoint(
                f"{path}: written by another version of free-transformer; resume it with that one, or choose another "
                "run_dir"
            )
        facts.update({name: int(facts[name]) for name in (*COUNTS, "processes")})
        for name, size in facts["files"].items():
            if (actual := (path / name).stat().st_size) != size:
                raise OSError(f"{name} has {actual} bytes of {size}")
        metadata: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        return facts, {name: torch.Size(each.size) for name, each in metadata.items()}
    except UnusableCheckpoint:
        raise
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _identity(path: Path, facts: dict[str, Any]) -> Identity:
    if not facts.get("identity"):
        raise UnusableCheckpoint(f"{path}: does not say which run it is of")
    try:
        return Identity.from_json(facts["identity"])
    except TypeError as error:
        raise _unreadable(path, error) from error


def _is_ours(path: Path) -> bool:
    """Whether a checkpoint has only the files that were written with it."""
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
        return {file.name for file in path.iterdir()} <= {*files, STATE}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, each once: a tied matrix has one name."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def _tensors(state: TrainState, processes: Processes) -> dict[str, Tensor]:
    """What is written, and what is read into: weights and optimizer state in place, random states as copies."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        **_model_tensors(state.model),
        **{
            f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value)
            for optimizer in state.optimizers
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        },
        **_random_states(state, processes),
    }


def _file_numbers(tensors: dict[str, Tensor], processes: int) -> dict[str, int]:
    """Which file each tensor goes to. Small ones, since the writer holds a whole file in memory, twice."""
    most = max(MIN_FILE_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // MAX_FILES)
    number, held = 1, 0
    numbers = {f"random.{rank}.{device}": 1 for rank in range(processes) for device in ("cpu", "cuda")}  # of others too
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > most:
            number, held = number + 1, 0
        numbers[name] = number
        held += tensor.nbytes
    return numbers


def _random_states(state: TrainState, processes: Processes) -> dict[str, Tensor]:
    """The random streams of this process, and the one that plans are drawn from, the same in all."""
    streams = {f"random.{processes.rank}.cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        streams[f"random.{processes.rank}.cuda"] = torch.cuda.get_rng_state(processes.device)
    streams[f"random.plans.{processes.device.type}"] = _plan_stream(state, processes)
    return streams


def _plan_stream(state: TrainState, processes: Processes) -> Tensor:
    mapper = getattr(state.model, "plan_mapper", None)
    if isinstance(mapper, SharedBinaryMapper):
        return mapper.generator.get_state()
    return random_state(processes.device)


def _restore_randomness(state: TrainState, processes: Processes, tensors: dict[str, Tensor], count: int) -> None:
    """Of another number of processes, only the stream of the plans is there to go on with."""
    kind = processes.device.type
    plans = tensors.get(f"random.plans.{kind}")
    mapper = getattr(state.model, "plan_mapper", None)
    if count == processes.size:
        torch.set_rng_state(tensors[f"random.{processes.rank}.cpu"])
        if (cuda := tensors.get(f"random.{processes.rank}.cuda")) is not None:
            torch.cuda.set_rng_state(cuda, processes.device)
    elif processes.size == 1 and plans is not None:
        (torch.cuda.set_rng_state if kind == "cuda" else torch.set_rng_state)(plans)
    if isinstance(mapper, SharedBinaryMapper) and plans is not None:
        mapper.generator.set_state(plans)


def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, set[str]]]:
    """Each parameter, and what the optimizer keeps of it once it has taken a step."""
    kept = OF_MUON if isinstance(optimizer, torch.optim.Muon) else OF_ADAM
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, kept


def _make_room(state: TrainState) -> None:
    """An optimizer that has taken no step has no state to read into."""
    for optimizer in state.optimizers:
        for parameter, kept in _parameters_of(optimizer):
            optimizer.state[parameter] = {
                key: torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                for key in sorted(kept)
            }


def _check_optimizers(path: Path, state: TrainState, saved: dict[str, torch.Size]) -> None:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    for optimizer in state.optimizers:
        for parameter, kept in _parameters_of(optimizer):
            prefix = f"optimizer.{names[parameter]}."
            if {name.removeprefix(prefix) for name in saved if name.startswith(prefix)} != kept:
                raise UnusableCheckpoint(
                    f"{path}: written with another optimizer.name; use the one it was trained with, or choose "
                    "another run_dir"
                )


def _check_shapes(path: Path, model: nn.Module, saved: dict[str, torch.Size]) -> None:
    parameters = _model_tensors(model)
    for name in sorted(parameters.keys() ^ {name for name in saved if name.startswith("model.")}):
        where = "the checkpoint" if name in parameters else "this configuration"
        name = name.removeprefix("model.")
        raise UnusableCheckpoint(f"{path}: of another model ({where} has no {name}); choose another run_dir")
    for name, parameter in parameters.items():
        if parameter.shape != saved[name]:
            raise UnusableCheckpoint(
                f"{path}: {name.removeprefix('model.')} has shape {tuple(saved[name])}, this configuration needs "
                f"{tuple(parameter.shape)}; use the settings it was trained with, or choose another run_dir"
            )


def _unreadable(path: Path, error: BaseException) -> SettingsError:
    return UnusableCheckpoint(
        f"{path}: cannot be read ({_cause(error)}); delete it, or choose another run_dir, to start anew"
    )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _cause(error: BaseException) -> str:
    """What went wrong, of an error or of the first process that had one."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """`torch.distributed.checkpoint` warns of a single process, even where it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
