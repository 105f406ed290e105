"""Code shared by all exports: checks of the model, comparison with it, and files saved next to the graphs."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.errors import InputError, RunError
from free_transformer.model.hub_code import name_code
from free_transformer.model.modeling import FreeTransformer
from free_transformer.runtime.sessions import PRIOR_FILE

SCHEMES = ("int8-weight", "int8-dynamic")
TOLERANCE = 1e-4  # largest difference of logits in float32, relative where their largest absolute value exceeds 1


@dataclass
class Difference:
    """
    How far an output of a graph differs from the model's, over all tokens except padding.

    Attributes:
        graph, output: names.
        texts, tokens: shape of the input.
        padded: whether the input has padding.
        difference: largest absolute difference.
        largest: largest absolute value of the model's output.
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
        """Compares the outputs of the model (`ours`) and of the graph (`theirs`) for the same tokens, (B, T)."""
        difference = float((ours.double() - theirs.double()).abs().max())
        return cls(graph, output, len(tokens), tokens.shape[1], padded, difference, float(ours.double().abs().max()))

    @property
    def share(self) -> float:
        """The difference as a fraction of the largest allowed one."""
        return self.difference / (TOLERANCE * max(1.0, self.largest))


def check_tolerance(differences: Sequence[Difference]) -> float:
    """Returns the tolerance. Raises `RuntimeError` if a difference exceeds it."""
    for worst in differences:
        if not worst.share <= 1:  # also true for NaN
            raise RunError(
                f"{worst.graph}: {worst.output} differs from the model by {worst.difference:.2g} at {worst.texts} "
                f"texts of {worst.tokens} tokens; at most {worst.difference / worst.share:.2g} is allowed, and "
                "nothing was saved"
            )
    return TOLERANCE


def check_export(model: PreTrainedModel, static: tuple[int, int] | None) -> FreeTransformer:
    """
    Returns the model.

    Args:
        static: numbers of texts and of tokens of fixed shapes, if any.

    Raises:
        ValueError: for a model without a plan or with 8-bit weights, and for static sizes that it does not support.
    """
    if not isinstance(model, FreeTransformer):
        raise InputError(f"{type(model).__name__} has no plan: export takes a Free Transformer")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("this model has 8-bit weights already: export the model that it was quantized from")
    if static is None:
        return model
    trained = model.config.max_position_embeddings
    if static[0] < 1 or not 4 <= static[1] <= trained:
        raise InputError(f"static={static}: at least 1 text, and from 4 to {trained} tokens (the model's max_seq_len)")
    return model


def traceable_copy(model: FreeTransformer) -> FreeTransformer:
    """Returns a copy for tracing: float32, on the CPU, in eval mode, with SDPA attention."""
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("sdpa")
    return model


def save_metadata(model: FreeTransformer, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Saves the configurations, the tokenizer if given, and the gathered prior if the model has one."""
    config = copy.deepcopy(model.config)
    name_code(config, wanted=False)  # the model's code cannot load an export
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.plan_prior.gathered:
        np.save(folder / PRIOR_FILE, model.plan_prior.log_aggregate.numpy(), allow_pickle=False)


@contextlib.contextmanager
def silence_exporters() -> Iterator[None]:
    """Hides warnings of the exporters about their own code and about optional packages."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
