"""Rows of texts by PyTorch, on a CPU or a GPU."""

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from free_transformer.cache import MIN_SPARE, PlanState
from free_transformer.data import begin_token
from free_transformer.model import FreeTransformer
from free_transformer.serving.batch import Batch, Complete, Sampling, checked_length

# With fewer rows, matrix libraries of CPUs take other ways, that round otherwise: a text would depend on how many are
# written beside it. From so many on, every row of a product was the same to the bit, whatever the others.
LEAST_ROWS = 16
COLUMNS = 64  # the cache is read up to a multiple of this


class TorchBatch(Batch):
    """
    Args:
        model: where it is to run; it is set to eval mode, and to PyTorch's attention.
        tokenizer: one of the package `tokenizers`, or of `transformers` that stands on one.
        most_rows: texts at a time.
        max_length: of a text in tokens, its prompt included, default that of the model, at most 2,048.

    Raises:
        ValueError: for a tokenizer without a `tokenizers.Tokenizer`, and a `max_length` beyond the model's.
    """

    def __init__(
        self,
        model: FreeTransformer,
        tokenizer: PreTrainedTokenizerBase,
        most_rows: int = 32,
        max_length: int | None = None,
    ):
        config = model.config
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{type(tokenizer).__name__}: a server needs a tokenizer of the package tokenizers")
        ends = model.generation_config.eos_token_id
        super().__init__(
            Tokenizer.from_str(backend.to_str()),
            begin_token(tokenizer),
            [] if ends is None else [ends] if isinstance(ends, int) else ends,
            config.vocab_size,
            config.latent_dim,
            config.plan_span,
            most_rows,
            checked_length(max_length, config.max_position_embeddings),
        )
        self.model = model.eval()
        if config._attn_implementation not in ("sdpa", "eager"):  # others take no mask of four dimensions
            model.set_attn_implementation("sdpa")
        rows = max(most_rows, LEAST_ROWS)
        self.cache = RowCache(model, rows, self.max_length)
        self.lengths = torch.zeros(rows, dtype=torch.long)
        shape = (rows, self.num_plans(self.max_length), config.latent_dim)
        self.plan = torch.zeros(shape, dtype=torch.bool, device=model.device)

    def prior(self, name: str) -> np.ndarray | None:
        prior = self.model.plan_prior
        return prior.log_aggregate.cpu().float().numpy() if prior.checked(name) == "aggregate" else None

    def infer_plan(self, tokens: list[int]) -> np.ndarray:
        return self.model.infer_plan(self._on_device([tokens]))[0].float().cpu().numpy()

    @torch.inference_mode()
    def add(self, tokens: list[int], complete: Complete, sampling: Sampling, uniform: float) -> int:
        model, row = self.model, self.rows
        cache = DynamicCache(config=model.config)
        half = model.first_half(self._on_device([tokens]), cache=cache)
        plan = complete(lambda: model.encode(half)[0].float().cpu().numpy())
        bits = self._on_device(plan)[None]
        logits = model.second_half(half, bits, logits_to_keep=1)[:, -1]
        self.plan[row, : bits.shape[1]] = bits[0]
        self.cache.store(row, cache)
        self.lengths[row] = len(tokens)
        self.rows += 1
        return draw(logits, [sampling], np.array([uniform]))[0]

    @torch.inference_mode()
    def step(self, tokens: list[int], sampling: list[Sampling], uniform: np.ndarray) -> list[int]:
        rows = max(self.rows, LEAST_ROWS)
        lengths = self._on_device(self.lengths[:rows])
        mask = self.cache.begin_step(lengths, int(self.lengths[:rows].max()) + 1)
        ids = self._on_device(tokens + [self.begin] * (rows - self.rows))[:, None]
        logits = self.model(
            ids,
            attention_mask=mask,
            position_ids=lengths[:, None],
            cache=self.cache,
            plan=PlanState(plan=self.plan[:rows], columns=0),
            logits_to_keep=1,
        ).logits
        self.lengths[: self.rows] += 1
        return draw(logits[: self.rows, -1], sampling, uniform)

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        last = self.rows = self.rows - 1
        if row != last:
            self.cache.move(last, row, int(self.lengths[last]))
            self.plan[row] = self.plan[last]
            self.lengths[row] = self.lengths[last]
        self.lengths[last] = 0  # nothing, as all rows that only fill up a step

    def _on_device(self, values: Any) -> Tensor:
        return torch.as_tensor(values).to(self.model.device)


class RowCache:
    """
    Keys and values of rows of different lengths, each from column 0 on: (rows, heads, columns, head_dim) a layer.

    It takes the place of a cache of `transformers` in a step that reads one token of each row.

    Attributes:
        is_compileable: for the model, that its mask tells all.
    """

    is_compileable = False

    def __init__(self, model: FreeTransformer, rows: int, max_length: int):
        config = model.config
        self.max_length = -(-max_length // COLUMNS) * COLUMNS
        shape = (rows, config.num_key_value_heads, min(MIN_SPARE, self.max_length), config.head_dim)
        layers = range(config.num_hidden_layers)
        # zeros: what a mask hides counts nothing, but what is not a number would
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def store(self, row: int, cache: DynamicCache) -> None:
        """A text alone becomes a row."""
        self._reserve(cache.get_seq_length())
        for ours, theirs in zip([self.keys, self.values], ["keys", "values"], strict=True):
            for states, layer in zip(ours, cache.layers, strict=True):
                read = getattr(layer, theirs)[0]
                states[row, :, : read.shape[1]] = read

    def move(self, row: int, to: int, length: int) -> None:
        for states in [*self.keys, *self.values]:
            states[to, :, :length] = states[row, :, :length]

    def begin_step(self, lengths: Tensor, columns: int) -> Tensor:
        """The mask, (rows, 1, 1, columns) bool, of a step that reads a token of each row; `columns` then hold all."""
        self._reserve(columns)
        columns = -(-columns // COLUMNS) * COLUMNS
        self.lengths, self.columns = lengths, columns
        self.places = torch.arange(len(lengths), device=lengths.device)
        return (torch.arange(columns, device=lengths.device) <= lengths[:, None])[:, None, None]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Both (rows, heads, 1, head_dim), of the new tokens; returns those of all columns of the step."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.places, :, self.lengths] = key[:, :, 0]
        values[self.places, :, self.lengths] = value[:, :, 0]
        rows = len(self.places)
        return keys[:rows, :, : self.columns], values[:rows, :, : self.columns]

    def _reserve(self, columns: int) -> None:
        held = self.keys[0].shape[2]
        if columns <= held:
            return
        room = min(max(2 * held, -(-columns // COLUMNS) * COLUMNS), self.max_length)
        for states in (self.keys, self.values):
            for layer, old in enumerate(states):
                states[layer] = torch.nn.functional.pad(old, (0, 0, 0, room - held))


def draw(logits: Tensor, sampling: list[Sampling], uniform: np.ndarray) -> list[int]:
    """`deploy.arrays.draw` where the logits, (B, V), are."""
    chosen = logits.argmax(-1)
    drawn = [row for row, each in enumerate(sampling) if each.temperature > 0]
    cut = [row for row in drawn if sampling[row].top_k or sampling[row].top_p < 1]
    for rows in ([row for row in drawn if row not in cut], cut):
        if not rows:
            continue

        def setting(name: str, rows: list[int] = rows) -> Tensor:
            values = [getattr(sampling[row], name) for row in rows]
            return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

        scaled = logits[rows].double() / setting("temperature")
        chances = (scaled - scaled.amax(-1, keepdim=True)).exp()
        order = None
        if rows is cut:
            chances, order = torch.sort(chances, dim=-1, descending=True, stable=True)
            rank = torch.arange(chances.shape[1], device=logits.device)
            top_k = setting("top_k")
            chances = chances.where((rank < top_k) | (top_k == 0), 0)
            before = chances.cumsum(-1) - chances
            chances = chances.where(before < setting("top_p") * chances.sum(-1, keepdim=True), 0)
        reached = chances.cumsum(-1)
        numbers = torch.from_numpy(uniform[rows]).to(reached)[:, None]
        picked = (reached < numbers * reached[:, -1:]).sum(-1, keepdim=True)
        chosen[rows] = (picked if order is None else order.gather(1, picked))[:, 0]
    return chosen.tolist()
