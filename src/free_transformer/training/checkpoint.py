"""Checkpoints: all that a run needs to go on as if it had never stopped."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from free_transformer.files import TEMPORARY, first_line, new_folder
from free_transformer.training.settings import SettingsError

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"


@dataclass
class TrainState:
    """What a checkpoint holds; the data's position and the learning rate follow from the step."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Writes `folder/step-N/` at once, then drops all but the newest `keep`."""
    path = folder / f"step-{state.step}"
    with new_folder(path) as temporary:
        save_file(_untied(state.model), temporary / MODEL)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        torch.save({"optimizers": [o.state_dict() for o in state.optimizers], "rng": rng}, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps({"step": state.step}))
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what a crash left behind is cleared away."""
    if not folder.is_dir():
        return []
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return [found[step] for step in sorted(found)]


def load_checkpoint(path: Path, state: TrainState) -> None:
    """
    Raises:
        SettingsError: for a checkpoint that cannot be read or is of a model of another shape.
    """
    device = next(state.model.parameters()).device
    try:
        weights = load_file(path / MODEL, device=str(device))
        rest = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        step = json.loads((path / STATE).read_text())["step"]
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise SettingsError(
            f"{path}: cannot be read ({first_line(error)}); delete it to resume from the one before"
        ) from error
    _check_shapes(path, state.model, weights)
    state.model.load_state_dict(weights, strict=False)
    try:
        for optimizer, saved in zip(state.optimizers, rest["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except ValueError as error:
        raise SettingsError(
            f"{path}: written with another training.optimizer or table_optimizer; take the one it was trained with, "
            "another run_dir or resume=never"
        ) from error
    torch.set_rng_state(rest["rng"]["cpu"])
    if "cuda" in rest["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(rest["rng"]["cuda"])
    state.step = step


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters, each once: safetensors refuses memory that two names share."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def _check_shapes(path: Path, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ weights.keys()):
        where = "the checkpoint" if name in parameters else "this configuration"
        raise SettingsError(f"{path}: another model's ({where} has no {name}); take another run_dir or resume=never")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise SettingsError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, this configuration needs "
                f"{tuple(parameter.shape)}; take the settings it was trained with, another run_dir or resume=never"
            )
