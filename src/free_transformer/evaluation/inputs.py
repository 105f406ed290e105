"""Converts batches to the inputs of models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from free_transformer.model.losses import IGNORED
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.outputs import LowerOutput


def run_lower_layers(model: FreeTransformer, inputs: Mapping[str, Any]) -> LowerOutput:
    """Runs the lower layers on `input_ids` and the optional tensors of a batch."""
    return model.lower_layers(**inputs)


def baseline_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor | bool]:
    """
    Converts a batch to the inputs of a plain Llama.

    `transformers` separates packed documents by their positions only without an `attention_mask` and without a cache.
    Padding on the right needs no mask; it is treated as documents of one token.
    """
    packed = "position_ids" in batch
    inputs = {name: values for name, values in batch.items() if name != "attention_mask" or not packed}
    return {**inputs, "use_cache": False}


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the labels of a batch, (B, T). Without labels, all real tokens that have a context are predicted."""
    if "labels" in batch:
        return batch["labels"]
    labels, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        # with padding on the left, the first real token has no context to be predicted from
        labels = labels.masked_fill((mask == 0) | ((mask.cumsum(1) == 1) & (mask == 1)), IGNORED)
    if positions is not None:  # neither has the first token of a packed document
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        labels = labels.masked_fill(starts, IGNORED)
    return labels
