"""A batch that runs on onnxruntime, without torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from free_transformer.errors import InputError
from free_transformer.model.sampling import Sampling, trained_length
from free_transformer.runtime.arrays import sample_rows
from free_transformer.runtime.onnx_model import OnnxFreeTransformer
from free_transformer.serving.batch import Batch, NewRow, TextRequest, checked_length
from free_transformer.serving.chat import ChatTemplate
from free_transformer.serving.scoring import PromptLogits

if TYPE_CHECKING:
    from onnxruntime import OrtValue

SCORED_TOKENS = 256  # tokens of a prompt that are scored at a time


class OnnxBatch(Batch[np.ndarray]):
    """
    A batch that runs an ONNX export.

    The cache is as wide as the longest text, or less than twice the sliding window if the model has one. Shorter texts
    are padded on the left. The graph copies the cache at every step, so more than a few rows bring little benefit.

    Args:
        model: an export with dynamic shapes.
        max_rows: maximum number of texts at a time.
        max_length: maximum number of tokens of a text that the model sees at a time. Default: the model's, at most
            2,048.

    Raises:
        ValueError: for an export with static shapes or without a tokenizer, and a `max_length` above the model's.
    """

    def __init__(self, model: OnnxFreeTransformer, max_rows: int = 8, max_length: int | None = None):
        if model.static is not None:
            raise InputError(f"{model.folder}: has fixed sizes; a server needs an export without --static")
        config = model.config
        super().__init__(
            model.tokenizer,
            model.begin_token,
            model.ends(),
            config["vocab_size"],
            model.latent_dim,
            model.plan_span,
            max_rows,
            checked_length(max_length, trained_length(config)),
            ChatTemplate.from_folder(model.folder),
            config.get("sliding_window"),
            config.get("plan_names"),
        )
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.contexts = []
        self.plan = np.zeros((self.max_rows, self.num_plans(self.max_length), self.latent_dim), dtype=bool)
        self.lengths = np.zeros(self.max_rows, dtype=np.int64)
        # for each row: the keys and values that contain it in their last columns, and its row index in them
        self.places: list[tuple[list[OrtValue], int]] = []

    def prior(self, name: str) -> np.ndarray | None:
        return self.model.prior(name)

    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        return self.model.infer_plan([tokens])[0]

    def add(self, request: TextRequest) -> NewRow[np.ndarray]:
        plan, tokens, row = self.complete_plan(request), request.tokens, self.rows
        context = self.begin_context(request, plan)
        plans = context.plans(self.max_length)
        self.plan[row, : len(plans)] = plans
        logits, past = self._read(np.array([tokens]), self.plan[row : row + 1], self.model.no_past(1))
        self.places.append((past, 0))
        self.lengths[row] = len(tokens)
        self.contexts.append(context)
        return NewRow(plan, logits[:, -1])

    def read_again(self, row: int) -> int:
        context, past = self.contexts[row].read_again(), self.model.no_past(1)
        plans = context.plans(self.max_length)
        if context.tokens:
            _, past = self._read(np.array([context.tokens]), plans[None], past)
        self.plan[row, : len(plans)] = plans
        self.places[row], self.lengths[row], self.contexts[row] = (past, 0), len(context.tokens), context
        return len(context.tokens)

    def step(self, tokens: Sequence[int | None]) -> np.ndarray:
        past = self._gathered()
        reads = np.array([token is not None for token in tokens])
        lengths = self.lengths[: self.rows] * reads + 1
        total = max(past[0].shape()[2] + 1, lengths.max())
        mask = np.arange(total) >= total - lengths[:, None]
        given = [self.begin if token is None else token for token in tokens]
        logits, present = self._read(np.array(given)[:, None], self.plan[: self.rows], past, mask)
        self.lengths[: self.rows] += reads
        self.places = [(present, row) for row in range(self.rows)]
        self.advance(tokens)
        return logits[:, -1]

    def sample(self, logits: np.ndarray, sampling: Sequence[Sampling], uniform: np.ndarray) -> list[int]:
        return sample_rows(logits, sampling, uniform)

    def prompt_logits(self, tokens: list[int], plans: np.ndarray, columns: int) -> PromptLogits:
        pasts = [self.model.no_past(1) for _ in plans]
        size = min(columns, SCORED_TOKENS)
        for start in range(0, len(tokens), size):
            piece = np.array([tokens[start : start + size]])
            mask = np.ones((1, start + piece.shape[1]), dtype=bool)
            for which, plan in enumerate(plans):
                asked = np.arange(piece.shape[1])
                logits, pasts[which] = self._read(piece, plan[None], pasts[which], mask, asked)
                yield start, which, logits[0]

    def remove(self, row: int) -> None:
        last = self.rows - 1
        self.contexts[row] = self.contexts[last]
        self.contexts.pop()
        self.plan[row], self.lengths[row], self.places[row] = self.plan[last], self.lengths[last], self.places[last]
        self.places.pop()

    def _gathered(self) -> "list[OrtValue]":
        """Returns the keys and values of all rows, copied only if rows were added or removed since the last step."""
        first = self.places[0][0]
        if first[0].shape()[0] == self.rows and all(place == (first, row) for row, place in enumerate(self.places)):
            return first
        held = self.lengths[: self.rows]
        if self.model.window is not None:
            held = np.minimum(held, self.model.window - 1)
        gathered = []
        arrays = {id(past): [each.numpy() for each in past] for past, _ in self.places}
        for which, example in enumerate(first):
            _, heads, _, head_dim = example.shape()
            states = np.zeros((self.rows, heads, held.max(), head_dim), np.float32)
            for row, (past, place) in enumerate(self.places):
                read = arrays[id(past)][which][place]
                states[row, :, held.max() - held[row] :] = read[:, read.shape[1] - held[row] :]
            gathered.append(states)
        return self.model.ort_values(gathered)

    def _read(
        self,
        tokens: np.ndarray,
        plan: np.ndarray,
        past: "list[OrtValue]",
        mask: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ) -> "tuple[np.ndarray, list[OrtValue]]":
        """Returns logits of some columns, default the last, (B, C, V), and keys and values of the text so far."""
        mask = np.ones_like(tokens) if mask is None else mask.astype(np.int64)
        columns = np.array([tokens.shape[1] - 1]) if columns is None else columns
        inputs = {"input_ids": tokens, "attention_mask": mask, "columns": columns, "plan": plan}
        logits, *present = self.model.run("decode", inputs, past)
        return logits.numpy(), self.model.within_window(present)
