"""Rows of texts by onnxruntime, with no torch."""

from typing import Any

import numpy as np

from free_transformer.deploy.arrays import draw
from free_transformer.deploy.onnx_model import OnnxFreeTransformer
from free_transformer.serving.batch import Batch, Complete, Sampling, checked_length


class OnnxBatch(Batch):
    """
    The cache is as wide as the longest text; shorter ones have padding on their left. The graph copies it at every
    step, so that more than a few rows at a time gain little.

    Args:
        model: an export of free sizes.
        most_rows: texts at a time.
        max_length: of a text in tokens, its prompt included, default that of the model, at most 2,048.

    Raises:
        ValueError: for an export of fixed sizes or without a tokenizer, and a `max_length` beyond the model's.
    """

    def __init__(self, model: OnnxFreeTransformer, most_rows: int = 8, max_length: int | None = None):
        if model.static is not None:
            raise ValueError(f"{model.folder}: made for fixed sizes; a server needs an export without --static")
        config = model.config
        super().__init__(
            model.tokenizer,
            model.begin_token,
            model.ends(),
            config["vocab_size"],
            model.latent_dim,
            model.plan_span,
            most_rows,
            checked_length(max_length, config["max_position_embeddings"]),
        )
        self.model = model
        self.plan = np.zeros((most_rows, self.num_plans(self.max_length), self.latent_dim), dtype=bool)
        self.lengths = np.zeros(most_rows, dtype=np.int64)
        self.places: list[
            tuple[list[Any], int]
        ] = []  # keys and values that hold a row in their last columns, and where

    def prior(self, name: str) -> np.ndarray | None:
        return self.model.prior(name)

    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        return self.model.infer_plan([tokens])[0]

    def add(self, tokens: list[int], complete: Complete, sampling: Sampling, uniform: float) -> int:
        plan = complete(lambda: self.infer_plan(tokens))
        row = self.rows
        self.plan[row, : len(plan)] = plan
        mask = np.ones((1, len(tokens)), dtype=np.int64)
        logits, past = self._read(np.array([tokens]), mask, self.plan[row : row + 1], self.model.no_past(1))
        token = _draw(logits, [sampling], np.array([uniform]))[0]
        self.places.append((past, 0))
        self.lengths[row] = len(tokens)
        self.rows += 1
        return token

    def step(self, tokens: list[int], sampling: list[Sampling], uniform: np.ndarray) -> list[int]:
        past = self._gathered()
        columns = past[0].shape()[2]
        self.lengths[: self.rows] += 1
        mask = np.arange(columns + 1) >= columns + 1 - self.lengths[: self.rows, None]
        logits, present = self._read(np.array(tokens)[:, None], mask.astype(np.int64), self.plan[: self.rows], past)
        self.places = [(present, row) for row in range(self.rows)]
        return _draw(logits, sampling, uniform)

    def remove(self, row: int) -> None:
        last = self.rows = self.rows - 1
        self.plan[row], self.lengths[row], self.places[row] = self.plan[last], self.lengths[last], self.places[last]
        self.places.pop()

    def _gathered(self) -> list[Any]:
        """Keys and values of all rows: those of the last step, or where rows have come or gone, copies of them."""
        first = self.places[0][0]
        if first[0].shape()[0] == self.rows and all(place == (first, row) for row, place in enumerate(self.places)):
            return first
        columns = self.lengths[: self.rows].max()
        gathered = []
        arrays = {id(past): [each.numpy() for each in past] for past, _ in self.places}
        for which, example in enumerate(first):
            _, heads, _, head_dim = example.shape()
            states = np.zeros((self.rows, heads, columns, head_dim), np.float32)
            for row, (past, place) in enumerate(self.places):
                length = self.lengths[row]
                states[row, :, columns - length :] = arrays[id(past)][which][place, :, -length:]
            gathered.append(states)
        return self.model.ort_values(gathered)

    def _read(
        self, tokens: np.ndarray, mask: np.ndarray, plan: np.ndarray, past: list[Any]
    ) -> tuple[np.ndarray, list[Any]]:
        columns = np.array([tokens.shape[1] - 1])
        inputs = {"input_ids": tokens, "attention_mask": mask, "columns": columns, "plan": plan}
        logits, *present = self.model.run("decode", inputs, past)
        return logits.numpy()[:, -1], present


def _draw(logits: np.ndarray, sampling: list[Sampling], uniform: np.ndarray) -> list[int]:
    temperature, top_k, top_p = np.array([(each.temperature, each.top_k, each.top_p) for each in sampling]).T
    return draw(logits, temperature, top_k, top_p, uniform).tolist()
