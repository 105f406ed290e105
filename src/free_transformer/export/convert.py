"""Converts the folder of a pretrained model into that of a Free Transformer with the same logits."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.errors import InputError, SettingsError
from free_transformer.files import first_line, not_a_folder, own_folder
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.warm_start import NewPart, new_parts, random_tokens
from free_transformer.runs.load_model import has_plan, load_pretrained


@dataclass
class Conversion:
    """
    A converted model.

    Attributes:
        model: the Free Transformer, in eval mode.
        parts: its parameters that the pretrained model does not have.
        difference: largest absolute difference from the pretrained model's logits on random tokens; None if unchecked.
    """

    model: FreeTransformer
    parts: list[NewPart]
    difference: float | None


def convert(source: str, out: Path, check: bool = True, overwrite: bool = False, **settings: int | str) -> Conversion:
    """
    Saves a Free Transformer that has the same logits as a pretrained model until its plan is trained.

    Weights keep their type. The tokenizer, chat template, special tokens and generation settings are copied.

    Args:
        source: folder or Hub name of a Llama, Mistral, Qwen 2 or Qwen 3.
        out: the new folder.
        check: compare the logits of both models, which needs memory for both.
        overwrite: replace the contents of `out`.
        settings: fields of `FreeTransformerConfig`, such as `latent_dim` and `plan_span`.

    Raises:
        ValueError: if the model is of another kind, or already has a plan.
        SettingsError: if the folder cannot be read, or is damaged.
        InputError: if `out` exists and is not empty, without `overwrite`.
    """
    _refuse_to_overwrite(out, overwrite)
    if _has_plan(source):
        raise InputError(f"{source}: has a plan already; convert takes a pretrained model without one")
    model: FreeTransformer = load_pretrained(source, FreeTransformer, **settings)
    difference = _largest_difference(model, load_pretrained(source)) if check else None
    _save(out, model, source, overwrite)
    return Conversion(model, new_parts(model), difference)


@torch.no_grad()
def _largest_difference(model: FreeTransformer, pretrained: PreTrainedModel) -> float:
    tokens = random_tokens(model)
    return (model(tokens).logits - pretrained(tokens).logits).abs().max().item()


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def _save(out: Path, model: PreTrainedModel, source: str, overwrite: bool) -> None:
    tokenizer = _load_tokenizer(source)
    with own_folder(out, "conversion", overwrite, [Path(source)]) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _refuse_to_overwrite(out: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists already; name a new folder, or use --overwrite to replace it")


def _has_plan(source: str) -> bool:
    needed = "name a folder that `save_pretrained` has created, or a model on the Hub"
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise SettingsError(f"{source}: {not_a_folder(folder) or 'not a model (it has no config.json)'}; {needed}")
    try:
        return has_plan(source)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{source}: cannot be read as a model ({first_line(error)}); {needed}") from error
