"""The contents of a checkpoint: its description, its tensors, and checks that they match a run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from free_transformer.distributed.parallelize import SharedBinaryMapper, random_state
from free_transformer.distributed.processes import Processes
from free_transformer.files import first_line
from free_transformer.runs.lines import JsonObject
from free_transformer.settings import SettingsError
from free_transformer.training.identity import Identity

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel

STATE = "state.json"
FORMAT = 2  # version of state.json, in which data positions are in rows and the run's identity is included
COUNTS = ("step", "rows", "stage_rows", "skipped")
OF_ADAM = {"step", "exp_avg", "exp_avg_sq"}
OF_MUON = {"momentum_buffer"}
UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, CheckpointException)


class UnusableCheckpoint(SettingsError):
    """A checkpoint that is damaged or belongs to another run. An older one may be usable."""


@dataclass
class TrainState:
    """
    The state that a checkpoint stores, except random states. Learning rate and schedules follow from the step.

    Attributes:
        adapters: PEFT's tuner, if adapters are trained in place of the decoder's weights.
        step: number of optimizer steps done.
        rows: number of rows of training text read by all processes, which is the position in the data.
        stage_rows: number of these rows that earlier stages read from other text.
        skipped: number of steps that were skipped because a loss or gradient was NaN or infinite.
    """

    model: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    adapters: "LoraModel | None" = None
    step: int = 0
    rows: int = 0
    stage_rows: int = 0
    skipped: int = 0


class Description(TypedDict, total=False):
    """The contents of `state.json`."""

    step: int
    rows: int
    stage_rows: int
    skipped: int
    format: int
    processes: int
    scaler: JsonObject  # the state of torch's GradScaler
    identity: JsonObject | None  # `Identity.to_json`
    files: dict[str, int]  # sizes in bytes


def describe(state: TrainState, identity: Identity | None, num_processes: int) -> Description:
    """Builds the description of a state, without `files`."""
    return Description(
        step=state.step,
        rows=state.rows,
        stage_rows=state.stage_rows,
        skipped=state.skipped,
        format=FORMAT,
        processes=num_processes,
        scaler=state.scaler.state_dict(),
        identity=None if identity is None else identity.to_json(),
    )


def examine(path: Path) -> tuple[Description, dict[str, torch.Size]]:
    """
    Reads the description of a checkpoint and the shapes of its tensors.

    Raises:
        UnusableCheckpoint: if a file is damaged or incomplete, or another version wrote it.
    """
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        if "files" in values and values.get("format") != FORMAT:
            raise UnusableCheckpoint(
                f"{path}: written by another version of free-transformer; resume with that version, or choose another "
                "run_dir"
            )
        values.update({name: int(values[name]) for name in (*COUNTS, "processes")})
        for name, size in values["files"].items():
            if (actual := (path / name).stat().st_size) != size:
                raise OSError(f"{name} has {actual} bytes of {size}")
        metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        return cast(Description, values), {name: torch.Size(getattr(each, "size")) for name, each in metadata.items()}  # noqa: B009
    except UnusableCheckpoint:
        raise
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def saved_identity(path: Path, description: Description) -> Identity:
    """Returns the identity of the run that wrote a checkpoint. Raises `UnusableCheckpoint` if it is missing."""
    identity = description.get("identity")
    if not identity:
        raise UnusableCheckpoint(f"{path}: the identity of its run is missing; choose another run_dir")
    try:
        return Identity.from_json(identity)
    except TypeError as error:
        raise unreadable(path, error) from error


def has_only_our_files(path: Path) -> bool:
    """Whether a checkpoint contains only the files that were written with it."""
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
        return {file.name for file in path.iterdir()} <= {*files, STATE}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters; a tied matrix appears under one name."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def state_tensors(state: TrainState, processes: Processes) -> dict[str, Tensor]:
    """Returns the tensors to write or to read into. Random states are copies, the others share memory with `state`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        **model_tensors(state.model),
        **{
            f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value)
            for optimizer in state.optimizers
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        },
        **_random_states(state, processes),
    }


def _random_states(state: TrainState, processes: Processes) -> dict[str, Tensor]:
    """Returns the random states of this process and that of the plans, which is the same in all processes."""
    streams = {f"random.{processes.rank}.cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        streams[f"random.{processes.rank}.cuda"] = torch.cuda.get_rng_state(processes.device)
    mapper = getattr(state.model, "plan_mapper", None)
    streams[f"random.plans.{processes.device.type}"] = (
        mapper.generator.get_state() if isinstance(mapper, SharedBinaryMapper) else random_state(processes.device)
    )
    return streams


def restore_random_states(
    state: TrainState, processes: Processes, tensors: dict[str, Tensor], saved_processes: int
) -> None:
    """Restores the random states; only that of the plans if the number of processes has changed."""
    kind = processes.device.type
    plans = tensors.get(f"random.plans.{kind}")
    mapper = getattr(state.model, "plan_mapper", None)
    if saved_processes == processes.size:
        torch.set_rng_state(tensors[f"random.{processes.rank}.cpu"])
        if (cuda := tensors.get(f"random.{processes.rank}.cuda")) is not None:
            torch.cuda.set_rng_state(cuda, processes.device)
    elif processes.size == 1 and plans is not None:
        (torch.cuda.set_rng_state if kind == "cuda" else torch.set_rng_state)(plans)
    if isinstance(mapper, SharedBinaryMapper) and plans is not None:
        mapper.generator.set_state(plans)


def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, set[str]]]:
    """Yields each parameter and the names of its optimizer state."""
    kept = OF_MUON if isinstance(optimizer, torch.optim.Muon) else OF_ADAM
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, kept


def allocate_optimizer_state(state: TrainState) -> None:
    """Creates the optimizer state to read into, which does not exist before the first step."""
    for optimizer in state.optimizers:
        for parameter, kept in _parameters_of(optimizer):
            optimizer.state[parameter] = {
                key: torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                for key in sorted(kept)
            }


def check_optimizers(path: Path, state: TrainState, saved: dict[str, torch.Size]) -> None:
    """Raises `UnusableCheckpoint` if another optimizer wrote the checkpoint."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    for optimizer in state.optimizers:
        for parameter, kept in _parameters_of(optimizer):
            prefix = f"optimizer.{names[parameter]}."
            if {name.removeprefix(prefix) for name in saved if name.startswith(prefix)} != kept:
                raise UnusableCheckpoint(
                    f"{path}: written with another optimizer.name; use the original optimizer, or choose "
                    "another run_dir"
                )


def check_shapes(path: Path, model: nn.Module, saved: dict[str, torch.Size]) -> None:
    """Raises `UnusableCheckpoint` if the checkpoint belongs to another model."""
    parameters = model_tensors(model)
    for name in sorted(parameters.keys() ^ {name for name in saved if name.startswith("model.")}):
        where = "the checkpoint" if name in parameters else "this configuration"
        name = name.removeprefix("model.")
        raise UnusableCheckpoint(f"{path}: belongs to another model ({where} has no {name}); choose another run_dir")
    for name, parameter in parameters.items():
        if parameter.shape != saved[name]:
            raise UnusableCheckpoint(
                f"{path}: {name.removeprefix('model.')} has shape {tuple(saved[name])}, but this configuration needs "
                f"{tuple(parameter.shape)}; use the original settings, or choose another run_dir"
            )


def unreadable(path: Path, error: BaseException) -> UnusableCheckpoint:
    return UnusableCheckpoint(
        f"{path}: cannot be read ({cause_of(error)}); to start again, delete it or choose another run_dir"
    )


def cause_of(error: BaseException) -> str:
    """Returns the reason for an error, or for the error of the first process that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
