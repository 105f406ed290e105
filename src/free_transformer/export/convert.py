"""From the folder of a pretrained model to that of a Free Transformer with the same logits, and back if exact."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.errors import SettingsError
from free_transformer.files import first_line, own_folder
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.plan_text import format_plan, parse_plan
from free_transformer.model.warm_start import NewPart, new_parts, random_tokens
from free_transformer.runs.load_model import has_plan, load_pretrained


@dataclass
class Conversion:
    """
    Attributes:
        parts: what the pretrained model did not bring.
        difference: the largest of the logits from those of the pretrained model, on random tokens; None unchecked.
    """

    model: FreeTransformer
    parts: list[NewPart]
    difference: float | None


def convert(source: str, out: Path, check: bool = True, overwrite: bool = False, **settings: Any) -> Conversion:
    """
    Writes a Free Transformer that computes as the pretrained model does, until its plan is trained.

    Weights keep their type; tokenizer, chat template, special tokens and generation settings come along.

    Args:
        source: folder, or name on the hub, of a Llama, Mistral, Qwen 2 or Qwen 3.
        check: compare the logits of both, which holds both in memory.
        overwrite: replaces what `out` holds.
        settings: of `FreeTransformerConfig`, such as latent_dim and plan_span.

    Raises:
        ValueError: for a model of another kind, or one that has a plan already.
        SettingsError: where the folder cannot be read, or is damaged.
        FileExistsError: where `out` is there already, and not empty.
    """
    _refuse_to_overwrite(out, overwrite)
    if _has_plan(source):
        raise ValueError(f"{source}: has a plan already; --merge-plan is the way back")
    model = load_pretrained(source, FreeTransformer, **settings)
    difference = _difference(model, load_pretrained(source)) if check else None
    _write(out, model, source, overwrite)
    return Conversion(model, new_parts(model), difference)


def merge_plan(source: Path, out: Path, bits: str, overwrite: bool = False) -> PreTrainedModel:
    """
    Writes the model without a plan that computes what this one does under one plan, where there is one.

    Args:
        source: folder of a Free Transformer.
        bits: the plan, bit 0 first.
        overwrite: replaces what `out` holds.

    Raises:
        ValueError: for a plan whose vector is not zero, or a model that has none.
        SettingsError, FileExistsError: as by `convert`.
    """
    _refuse_to_overwrite(out, overwrite)
    if not _has_plan(str(source)):
        raise ValueError(f"{source}: no Free Transformer, so there is no plan to merge")
    model = load_pretrained(source, FreeTransformer)
    plan = parse_plan(bits, model.config.latent_dim)
    if len(plan) > 1:
        raise ValueError(f"plan {bits}: {len(plan)} plans; a model without a plan can hold one at the most")
    merged = without_plan(model, plan[0])
    _write(out, merged, str(source), overwrite)
    return merged


def without_plan(model: FreeTransformer, plan: Tensor) -> PreTrainedModel:
    """`merge_plan` of a model in memory and a plan, (H,) bool."""
    vector = model.plan_table(plan[None, None])
    if vector.any():
        layers = ", ".join(map(str, model.config.injection_layers or []))
        raise ValueError(
            f"plan {format_plan(plan)} cannot be merged: it adds a vector of norm {vector.norm():.3g} to what layer "
            f"{layers} makes its keys and values of, before the norm, and not to what it makes its queries of. No "
            "weights of a plain model do that; write under the plan instead, generate --plan"
        )
    plain = AutoModelForCausalLM.from_config(model.config.to_llama(), dtype=model.dtype)
    shared = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(shared)
    plain.generation_config = model.generation_config
    return plain.eval()


@torch.no_grad()
def _difference(model: FreeTransformer, pretrained: PreTrainedModel) -> float:
    tokens = random_tokens(model)
    return (model(tokens).logits - pretrained(tokens).logits).abs().max().item()


def _tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def _write(out: Path, model: PreTrainedModel, source: str, overwrite: bool) -> None:
    tokenizer = _tokenizer(source)
    with own_folder(out, "conversion", overwrite, [Path(source)]) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _refuse_to_overwrite(out: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; name a new folder, or use --overwrite to replace it")


def _has_plan(source: str) -> bool:
    try:
        return has_plan(source)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{source}: cannot be read as a model ({first_line(error)})") from error
