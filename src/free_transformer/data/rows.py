"""
Rows of tokens: the training data of a model.

A *piece* is a begin-of-text token followed by up to `seq_len - 1` tokens of one document. Each piece has its own plans.
A *row* holds one piece, or several short ones side by side. Positions restart at 0 in each piece and are -1 on padding,
so rows need no other record of their boundaries. `packing.py` builds rows from documents.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor

from free_transformer.errors import InputError
from free_transformer.model.losses import IGNORED

Batch = dict[str, Tensor]

BLOCK = 4096  # rows of a mixture whose sources are sampled together
PADDING = -1


@dataclass
class Rows:
    """
    Rows in memory.

    Attributes:
        tokens: (R, T) int32.
        positions: (R, T) int32, each token's position in its piece, -1 on padding.
        text_bytes: UTF-8 bytes of all text in the rows, used to compute losses per byte.
        documents: (D,) uint64, a hash of each document that the rows were built from, in reading order.
    """

    tokens: np.ndarray
    positions: np.ndarray
    text_bytes: int
    documents: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens to predict: all except begin-of-text tokens and padding."""
        return int((self.positions > 0).sum())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per predicted token."""
        return self.text_bytes / max(1, self.predicted_tokens)

    @property
    def seq_len(self) -> int:
        """T, tokens per row."""
        return self.tokens.shape[1]

    @property
    def digest(self) -> str:
        """A hash of all documents and their order, 32 hexadecimal digits."""
        return hashlib.blake2b(self.documents.astype("<u8").tobytes(), digest_size=16).hexdigest()

    def __getitem__(self, index: int | np.ndarray | slice) -> Batch:
        """
        Returns one row, (T,) per tensor, or several, (B, T), as model inputs: `input_ids`, `labels`, `attention_mask`
        and `position_ids`. Together with `len`, this makes `Rows` a data set for `DataLoader` and
        `transformers.Trainer`.
        """
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        positions = torch.from_numpy(self.positions[index].astype(np.int64))
        return {
            "input_ids": tokens,
            "labels": tokens.masked_fill(positions <= 0, IGNORED),
            "attention_mask": (positions != PADDING).long(),
            "position_ids": positions.clamp(min=0),
        }

    def take(self, indices: np.ndarray | slice) -> Batch:
        """
        Returns rows as model inputs: `input_ids` and `labels`, (B, T) each. If any of the rows is packed or padded, the
        batch also has `attention_mask` and `position_ids`.
        """
        batch = self[indices]
        if (batch["position_ids"] == torch.arange(self.seq_len)).all():
            del batch["attention_mask"], batch["position_ids"]
        return batch

    def sample(self, size: int, seed: int = 0) -> "Rows":
        """
        Samples `size` rows without replacement, or returns all rows if there are fewer. `text_bytes` is scaled to the
        sampled rows. `documents` keeps the hashes of all documents.
        """
        if size >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:size])
        part = Rows(self.tokens[chosen], self.positions[chosen], 0, self.documents)
        part.text_bytes = round(self.bytes_per_token * part.predicted_tokens)
        return part

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches that contain each row once, in order. The last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.take(slice(start, start + batch_size))

    def shuffled(
        self,
        batch_size: int,
        seed: int,
        start: int = 0,
        worker: int = 0,
        workers: int = 1,
        share: slice = slice(None),
    ) -> Iterator[Batch]:
        """
        Yields an endless stream of batches. Each epoch is a permutation of all rows. Epochs follow without a gap, so a
        batch may contain rows of both.

        Args:
            start: number of rows to skip without reading them. It is counted in rows, so that a run can resume
                with another batch size.
            worker: index of this worker among `workers`. Workers alternate: each yields every `workers`-th batch,
                starting with the batch of its own index.
            share: part of each batch to return, if several processes split a batch.

        Raises:
            InputError: if there are fewer rows than `batch_size`.
        """
        if len(self) < batch_size:
            raise InputError(
                f"the training text fills {len(self)} rows of {self.tokens.shape[1]} tokens, fewer than "
                f"batch_size={batch_size}: add text, or use a smaller batch_size or seq_len"
            )
        order = EpochOrder(len(self), [seed])
        for first in count(start + worker * batch_size, workers * batch_size):
            yield self.take(np.sort(order.take(first, first + batch_size))[share])


class EpochOrder:
    """
    An endless sequence of row indices: each epoch is a permutation of all rows. Only one permutation is in memory, so
    the cost of `take` does not depend on the number of rows, except at the beginning of an epoch.
    """

    def __init__(self, rows: int, seed: list[int]):
        self.rows, self.seed = rows, seed
        self.epoch = -1
        self.permutation = np.empty(0, dtype=np.int64)

    def take(self, start: int, stop: int) -> np.ndarray:
        """Returns the row indices from `start` to `stop - 1` of the sequence, int64."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            epoch, place = divmod(start, self.rows)
            part = self._permutation(epoch)[place : place + stop - start]
            parts.append(part.astype(np.int64))
            start += len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            numbers = np.arange(self.rows, dtype=np.min_scalar_type(self.rows))
            self.permutation = np.random.default_rng([*self.seed, epoch]).permutation(numbers)
            self.epoch = epoch
        return self.permutation


class SourceOrder:
    """
    An endless sequence of sources, one per row, sampled with the probabilities `shares`.

    For each block of rows, the number of rows per source is sampled first. Their order within the block is sampled only
    when it is needed. Skipping ahead to a distant block therefore only adds up row counts.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        self.shares, self.seed = shares, seed
        self.rng = np.random.default_rng([seed, len(shares)])
        self.block = -1
        self.taken = self.counts = np.zeros(len(shares), dtype=np.int64)  # rows before the block, and in it
        self._skip(1)

    def taken_before(self, place: int) -> np.ndarray:
        """Returns the number of rows per source before this place. Places must not decrease between calls."""
        block, rest = divmod(place, BLOCK)
        while self.block < block:
            self._skip(min(block - self.block, BLOCK))
        return self.taken + np.bincount(self.order[:rest], minlength=len(self.shares))

    def _skip(self, blocks: int) -> None:
        sampled = self.rng.multinomial(BLOCK, self.shares, size=blocks)
        self.taken = self.taken + self.counts + sampled[:-1].sum(0)
        self.counts = sampled[-1]
        self.block += blocks
        # NumPy ignores trailing zeros of a seed, so [seed, len(shares), 0] would repeat the stream of the counts
        rng = np.random.default_rng([self.seed, len(self.shares) + 1, self.block])
        self.order = rng.permutation(np.repeat(np.arange(len(self.shares)), self.counts))


@dataclass
class MixedRows:
    """
    Rows of several sources, mixed in given shares. Sources with few rows are repeated more often.

    Attributes:
        parts: the rows of each source, all with the same `seq_len`.
        shares: probability of each source for a row; they add up to 1.
    """

    parts: list[Rows]
    shares: list[float]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def seq_len(self) -> int:
        """T, tokens per row."""
        return self.parts[0].seq_len

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens to predict in all sources."""
        return sum(part.predicted_tokens for part in self.parts)

    def shuffled(
        self,
        batch_size: int,
        seed: int,
        start: int = 0,
        worker: int = 0,
        workers: int = 1,
        share: slice = slice(None),
    ) -> Iterator[Batch]:
        """Same as `Rows.shuffled`, but samples a source for each row. Each source has its own epochs."""
        sources = SourceOrder(self.shares, seed)
        orders = [EpochOrder(len(part), [seed, index]) for index, part in enumerate(self.parts)]
        for first in count(start + worker * batch_size, workers * batch_size):
            places = zip(sources.taken_before(first), sources.taken_before(first + batch_size), strict=True)
            chosen = [
                (part, np.sort(order.take(int(begin), int(end))))
                for part, order, (begin, end) in zip(self.parts, orders, places, strict=True)
            ]
            tokens = np.concatenate([part.tokens[rows] for part, rows in chosen])[share]
            positions = np.concatenate([part.positions[rows] for part, rows in chosen])[share]
            yield Rows(tokens, positions, 0).take(slice(None))


TrainingRows = Rows | MixedRows
