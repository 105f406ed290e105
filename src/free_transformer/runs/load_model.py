"""Loads models from folders, checks that weights are complete and finite, and copies them to memory."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from free_transformer.errors import SettingsError
from free_transformer.files import few, first_line
from free_transformer.model.configuration import FreeTransformerConfig
from free_transformer.model.modeling import FreeTransformer

# weights that a pretrained model without a plan does not have; they are initialized instead
PLAN_PARTS = ("encoder.", "plan_table.", "plan_prior.")
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, EOFError, AttributeError, RuntimeError, UnpicklingError)


def load_pretrained(source: str | Path, kind: Any = AutoModelForCausalLM, **options: object) -> PreTrainedModel:
    """
    Loads a model with `kind.from_pretrained(source)`, in eval mode.

    Unlike `transformers`, which initializes missing weights at random and maps files that may change while the model is
    in use, this raises an error for missing weights and copies the weights to memory.

    Args:
        source: a folder, or a name on the Hub.
        kind: `AutoModelForCausalLM` or a model class.
        options: options of `from_pretrained`.

    Raises:
        SettingsError: if the folder cannot be read, or weights are missing, have another shape, or are NaN or infinite.
    """
    folder = Path(source)
    if folder.is_dir():
        locked = [file.name for file in folder.iterdir() if not os.access(file, os.R_OK)]
        if locked:
            raise SettingsError(f"{source}: {', '.join(locked)}: no permission to read")
    try:
        model, loading = kind.from_pretrained(
            str(source), output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        adds_plan = isinstance(model, FreeTransformer) and not has_plan(source)
    except UNREADABLE as error:
        raise SettingsError(f"{source}: the model cannot be read ({_reason(error)})") from error
    missing = [name for name in sorted(loading["missing_keys"]) if not (adds_plan and name.startswith(PLAN_PARTS))]
    check_names(source, "weights are missing", missing)
    check_names(source, "weights differ in shape from the configuration", _mismatched(loading["mismatched_keys"]))
    check_finite(source, model.state_dict().items())
    detach_from_files(model)
    return model.eval()


def has_plan(source: str | Path) -> bool:
    """Whether a folder, or a name on the Hub, contains a Free Transformer."""
    values, _ = PreTrainedConfig.get_config_dict(str(source))
    return values.get("model_type") == FreeTransformerConfig.model_type


def check_names(source: str | Path, what: str, names: list[str]) -> None:
    """Raises `SettingsError` with the first of `names`, if there are any."""
    if names:
        raise SettingsError(f"{source}: {what}: {few(names)}; the folder is damaged or incomplete: copy it again")


def check_finite(source: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises `SettingsError` with the names of tensors that contain NaN or infinite values."""
    wrong = []
    for name, tensor in tensors:
        plain = type(tensor) in (Tensor, torch.nn.Parameter)  # quantized tensors have their own classes
        if plain and tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                wrong.append(name)
    check_names(source, "weights are NaN or infinite", wrong)


@torch.no_grad()
def detach_from_files(model: PreTrainedModel) -> None:
    """Copies the weights, which may be mapped from files, to memory. Tied weights stay tied."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


def _mismatched(keys: Iterable[str | tuple[str, ...]]) -> list[str]:
    return sorted(key if isinstance(key, str) else key[0] for key in keys)


def _reason(error: BaseException) -> str:
    """Returns the reason for an error, spelled out if its message is not clear."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return first_line(error)
