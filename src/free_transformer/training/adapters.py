"""
LoRA fine-tuning: trains adapters of the decoder instead of its weights, and all weights of the plan's parts.

Needs `peft`: pip install 'free-transformer-lm[trainers]'.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from transformers import PreTrainedModel

from free_transformer.errors import MissingDependency
from free_transformer.model.modeling import FreeTransformer

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel

IN_FULL = ["encoder", "plan_table"]  # parts whose weights are trained in full
PREFIX = "base_model.model."  # prefix of names in PEFT's files
NAME = "default"


def add_adapters(model: PreTrainedModel, rank: int, first_layer: int = 0) -> "LoraModel":
    """
    Adds adapters to the projections of the layers from `first_layer` on, in place, and freezes all other pretrained
    weights.

    Returns:
        PEFT's tuner, for `write_adapters` and `merge_adapters`.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise MissingDependency("training.lora_rank needs peft: pip install 'free-transformer-lm[trainers]'") from error
    layers = range(first_layer, model.config.num_hidden_layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf"model\.layers\.({'|'.join(map(str, layers))})\.(self_attn|mlp)\.\w+_proj",
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM",
    )
    tuner = LoraModel(model, {NAME: config}, NAME)
    if isinstance(model, FreeTransformer):
        for part in IN_FULL:
            getattr(model, part).requires_grad_(True)
    return tuner


def write_adapters(tuner: "LoraModel", folder: Path) -> None:
    """Writes a folder for `PeftModel.from_pretrained`: the adapters, and the parts trained in full."""
    model, config = tuner.model, copy.copy(tuner.peft_config[NAME])
    if isinstance(model, FreeTransformer):
        config.modules_to_save = IN_FULL
    tensors = {name.replace(f".{NAME}.", "."): value for name, value in model.state_dict().items() if "lora_" in name}
    for part in config.modules_to_save or []:
        tensors |= {f"{part}.{name}": value for name, value in getattr(model, part).state_dict().items()}
    save_file(
        {PREFIX + name: value.contiguous() for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.inference_mode = True
    config.save_pretrained(str(folder))


def merge_adapters(tuner: "LoraModel") -> PreTrainedModel:
    """Merges the adapters into the weights and returns the plain model."""
    return tuner.merge_and_unload()
