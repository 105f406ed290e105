"""Rows of texts by onnxruntime, with no torch."""

from typing import Any

import numpy as np

from free_transformer.deploy.arrays import draw
from free_transformer.deploy.onnx_model import OnnxFreeTransformer
from free_transformer.serving.batch import Batch, Complete, Sampling, checked_length


class OnnxBatch(Batch):
    """
    The cache is as wide as the longest text; shorter ones have padding on their left.

    Args:
        model: an export of free sizes.
        most_rows: texts at a time.
        max_length: of a text in tokens, its prompt included, default that of the model, at most 2,048.

    Raises:
        ValueError: for an export of fixed sizes or without a tokenizer, and a `max_length` beyond the model's.
    """

    def __init__(self, model: OnnxFreeTransformer, most_rows: int = 32, max_length: int | None = None):
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
        plans = self.num_plans(self.max_length)
        self.plan = np.zeros((0, plans, self.latent_dim), dtype=bool)
        self.mask = np.zeros((0, 0), dtype=np.int64)  # of the columns of the cache
        self.past: list[Any] = []  # `OrtValue`s of the last step, (rows, heads, columns, head_dim)

    def prior(self, name: str) -> np.ndarray | None:
        return self.model.prior(name)

    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        return self.model.infer_plan([tokens])[0]

    def add(self, tokens: list[int], complete: Complete, sampling: Sampling, uniform: float) -> int:
        plan = complete(lambda: self.infer_plan(tokens))
        plan = np.pad(plan, ((0, self.plan.shape[1] - len(plan)), (0, 0)))[None]
        mask = np.ones((1, len(tokens)), dtype=np.int64)
        logits, past = self._read(np.array([tokens]), mask, plan, self.model.no_past(1))
        token = _draw(logits, [sampling], np.array([uniform]))[0]
        if self.rows:
            columns = max(self.mask.shape[1], len(tokens))
            past = [
                np.concatenate([_wider(old.numpy(), columns, 2), _wider(new.numpy(), columns, 2)])
                for old, new in zip(self.past, past, strict=True)
            ]
            mask = np.concatenate([_wider(self.mask, columns, 1), _wider(mask, columns, 1)])
            plan = np.concatenate([self.plan, plan])
            past = self.model.ort_values(past)
        self.past, self.mask, self.plan = past, mask, plan
        self.rows += 1
        return token

    def step(self, tokens: list[int], sampling: list[Sampling], uniform: np.ndarray) -> list[int]:
        mask = np.concatenate([self.mask, np.ones((self.rows, 1), dtype=np.int64)], axis=1)
        logits, self.past = self._read(np.array(tokens)[:, None], mask, self.plan, self.past)
        self.mask = mask
        return _draw(logits, sampling, uniform)

    def remove(self, row: int) -> None:
        last = self.rows = self.rows - 1
        if last == 0:
            self.past, self.mask, self.plan = [], self.mask[:0, :0], self.plan[:0]
            return
        rows = np.array([*range(row), last, *range(row + 1, last)])[:last]
        mask = self.mask[rows]
        first = int(mask.any(0).argmax())  # columns before are padding in all that are left
        self.mask, self.plan = mask[:, first:], self.plan[rows]
        self.past = self.model.ort_values([each.numpy()[rows, :, first:] for each in self.past])

    def _read(
        self, tokens: np.ndarray, mask: np.ndarray, plan: np.ndarray, past: list[Any]
    ) -> tuple[np.ndarray, list[Any]]:
        columns = np.array([tokens.shape[1] - 1])
        inputs = {"input_ids": tokens, "attention_mask": mask, "columns": columns, "plan": plan}
        logits, *present = self.model.run("decode", inputs, past)
        return logits.numpy()[:, -1], present


def _wider(values: np.ndarray, columns: int, axis: int) -> np.ndarray:
    """Padded on the left."""
    width = [(0, 0)] * values.ndim
    width[axis] = (columns - values.shape[axis], 0)
    return np.pad(values, width)


def _draw(logits: np.ndarray, sampling: list[Sampling], uniform: np.ndarray) -> list[int]:
    settings = np.array([(each.temperature, each.top_k, each.top_p) for each in sampling]).T
    return draw(logits, *settings, uniform).tolist()
