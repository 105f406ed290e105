"""What exports of every kind have in common: what they refuse, what they are held against, what lies beside them."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.model.hub_code import name_code
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runtime.onnx_model import PRIOR_FILE

SCHEMES = ("int8-weight", "int8-dynamic")
TOLERANCE = 1e-4  # of logits, in float32; relative where they are above 1


@dataclass
class Difference:
    """
    The largest difference of an output of a graph from the model's, over all tokens that are no padding.

    Attributes:
        largest: absolute value of the model's output.
    """

    graph: str
    output: str
    texts: int
    tokens: int
    padded: bool
    difference: float
    largest: float

    @classmethod
    def of(cls, graph: str, output: str, tokens: Tensor, padded: bool, ours: Tensor, theirs: Tensor) -> "Difference":
        """Of what the model and the graph make of the same tokens, (B, T)."""
        difference = float((ours.double() - theirs.double()).abs().max())
        return cls(graph, output, len(tokens), tokens.shape[1], padded, difference, float(ours.double().abs().max()))

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return self.difference / (TOLERANCE * max(1.0, self.largest))


def within(differences: Sequence[Difference]) -> float:
    """The tolerance, where all differences keep within it. `RuntimeError` where one does not."""
    for worst in differences:
        if not worst.share <= 1:  # nor where it is no number
            raise RuntimeError(
                f"{worst.graph}: {worst.output} differs from the model by {worst.difference:.2g} at {worst.texts} "
                f"texts of {worst.tokens} tokens; at most {worst.difference / worst.share:.2g} is allowed, and "
                "nothing was written"
            )
    return TOLERANCE


def check_export(model: PreTrainedModel, static: tuple[int, int] | None) -> None:
    """`ValueError` for a model without a plan or with 8-bit weights, and sizes that it was not built for."""
    if not isinstance(model, FreeTransformer):
        raise ValueError(f"{type(model).__name__} has no plan: export takes a Free Transformer")
    if getattr(model.config, "quantization_config", None) is not None or dynamic_layers(model):
        raise ValueError("this model has 8-bit weights already: export the model that it was quantized from")
    if static is None:
        return
    trained = model.config.max_position_embeddings
    if static[0] < 1 or not 4 <= static[1] <= trained:
        raise ValueError(
            f"static={static}: at least 1 text, and from 4 to {trained} tokens, for which the model was built "
            "(max_seq_len)"
        )


def dynamic_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that int8-dynamic has made, with their names."""
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    return [(name, module) for name, module in model.named_modules() if isinstance(module, dynamic)]


def traceable(model: FreeTransformer) -> FreeTransformer:
    """A copy for tracers: in float32 on the CPU, in eval mode, with attention that they know."""
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("sdpa")
    return model


def write_rest(model: FreeTransformer, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Configuration, tokenizer, and the prior that was gathered, if any."""
    config = copy.deepcopy(model.config)
    name_code(config, wanted=False)  # it could not read what is written here
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.plan_prior.gathered:
        np.save(folder / PRIOR_FILE, model.plan_prior.log_aggregate.numpy(), allow_pickle=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a tracer's remarks on its own code, nor on packages that it could use but need not."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
