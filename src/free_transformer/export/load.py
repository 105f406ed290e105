"""Loads a model with its tokenizer from a run, a saved model or a quantized export."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.data import load_tokenizer
from free_transformer.errors import InputError
from free_transformer.export.quantize import load_quantized
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runs.run import Run
from free_transformer.runtime.arrays import check_vocabulary


def load_with_tokenizer(
    folder: Path, plan_strength: float | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a model, in eval mode, and its tokenizer.

    Args:
        folder: folder of a run, or one created by `save_pretrained` or `export --to torch`.
        plan_strength: factor of plan vectors. Default: the configuration's.

    Raises:
        SettingsError: for a folder that is not a run, has no model yet, or is damaged.
        InputError: for a tokenizer with token ids outside the model's vocabulary, and a plan strength for a model
            without a plan.
    """
    if (folder / "config.json").is_file():
        model, tokenizer = load_quantized(folder), load_tokenizer(str(folder))
        check_vocabulary(tokenizer, model.config.vocab_size, folder)
    else:
        model, tokenizer = Run.open(folder).load_with_tokenizer()
    if plan_strength is not None:
        if not isinstance(model, FreeTransformer):
            raise InputError(f"{folder}: a baseline has no plan; leave out --plan-strength")
        model.config.plan_strength = plan_strength
    return model, tokenizer
