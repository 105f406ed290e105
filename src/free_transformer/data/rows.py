"""
Rows of tokens: documents cut into windows, short ones packed together, boundaries kept.

A *piece* is a begin-of-text token and up to `seq_len - 1` tokens of one document: what has plans of its own. A
*row* is one piece, or several short ones side by side; positions start again at 0 with each piece and are -1 on
padding, so that rows need no other record of their boundaries.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data.tokenizer import begin_token, encode
from free_transformer.losses import IGNORED

Batch = dict[str, Tensor]

TOKENIZED_AT_ONCE = 64  # documents
OPEN_ROWS = 64  # rows that are kept open while short pieces are packed
PADDING = -1


@dataclass
class Rows:
    """
    Rows in memory.

    Attributes:
        tokens: (R, T) int32.
        positions: (R, T) int32, each token's place in its piece, -1 on padding.
        text_bytes: UTF-8 bytes of all the text in the rows, for losses per byte.
    """

    tokens: np.ndarray
    positions: np.ndarray
    text_bytes: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predicted_tokens(self) -> int:
        """Tokens that a model is asked to predict: all but begin-of-text and padding."""
        return int((self.positions > 0).sum())

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, self.predicted_tokens)

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    def nth_shuffled(self, numbers: np.ndarray, seed: list[int]) -> np.ndarray:
        """Indices of the rows at these places of an endless sequence, in which every epoch has its own order."""
        epochs, places = np.divmod(numbers, len(self))
        indices = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([*seed, int(epoch)]).permutation(len(self))
            indices[epochs == epoch] = order[places[epochs == epoch]]
        return indices

    def __getitem__(self, index: int | np.ndarray | slice) -> Batch:
        """
        A row as a model takes it, (T,) each, or several, (B, T): `input_ids`, `labels`, `attention_mask`,
        `position_ids`. With `len`, what a `DataLoader` and `transformers.Trainer` read.
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
        The rows as a model takes them: `input_ids` and `labels`, (B, T), and where some row is packed or padded also
        `attention_mask` and `position_ids`.
        """
        batch = self[indices]
        if (batch["position_ids"] == torch.arange(self.seq_len)).all():
            del batch["attention_mask"], batch["position_ids"]
        return batch

    def sample(self, size: int, seed: int = 0) -> "Rows":
        """`size` rows drawn without replacement, or all of them; the bytes in proportion."""
        if size >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:size])
        part = Rows(self.tokens[chosen], self.positions[chosen], 0)
        part.text_bytes = round(self.bytes_per_token * part.predicted_tokens)
        return part

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Each row once."""
        for start in range(0, len(self), batch_size):
            yield self.take(slice(start, start + batch_size))

    def shuffled(
        self, batch_size: int, seed: int, start: int = 0, step: int = 1, share: slice = slice(None)
    ) -> Iterator[Batch]:
        """
        Batches without end, every epoch in its own order; batch `start` is reached without reading those before.

        Args:
            step: take every so many batches, the first being `start`.
            share: the rows of each batch to take, where several processes share it.

        Raises:
            ValueError: where the rows do not fill one batch.
        """
        per_epoch = len(self) // batch_size
        if per_epoch == 0:
            raise ValueError(
                f"the training text fills {len(self)} rows of {self.tokens.shape[1]} tokens, fewer than "
                f"batch_size={batch_size}: add text, or take a smaller batch_size or seq_len"
            )
        while True:
            epoch = start // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            while start // per_epoch == epoch:
                first = start % per_epoch * batch_size
                yield self.take(np.sort(order[first : first + batch_size])[share])
                start += step


@dataclass
class MixedRows:
    """
    Rows of several sources, drawn in given shares; a source that is short is read more often.

    Attributes:
        parts: the rows of each source, of one length.
        shares: of the rows of a batch, on average; they add up to 1.
    """

    parts: list[Rows]
    shares: list[float]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def seq_len(self) -> int:
        return self.parts[0].seq_len

    @property
    def predicted_tokens(self) -> int:
        return sum(part.predicted_tokens for part in self.parts)

    def shuffled(
        self, batch_size: int, seed: int, start: int = 0, step: int = 1, share: slice = slice(None)
    ) -> Iterator[Batch]:
        """As `Rows.shuffled`: how many rows of a batch are whose is drawn, batch by batch, and so are they."""
        rng = np.random.default_rng([seed, len(self.parts)])
        taken = rng.multinomial(batch_size, self.shares, size=start).sum(0)
        for number in count(start):
            counts = rng.multinomial(batch_size, self.shares)
            if (number - start) % step == 0:
                drawn = [
                    (part, part.nth_shuffled(np.arange(first, first + many), [seed, index]))
                    for index, (part, first, many) in enumerate(zip(self.parts, taken, counts, strict=True))
                ]
                tokens = np.concatenate([part.tokens[rows] for part, rows in drawn])[share]
                positions = np.concatenate([part.positions[rows] for part, rows in drawn])[share]
                yield Rows(tokens, positions, 0).take(slice(None))
            taken = taken + counts


TrainingRows = Rows | MixedRows


def build_rows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Rows:
    """Reads all documents into rows of `seq_len` tokens. `ValueError` where there is nothing to predict."""
    tokens, positions, text_bytes = [], [], 0

    def counted() -> Iterator[str]:
        nonlocal text_bytes
        for document in documents:
            text_bytes += len(document.encode())
            yield document

    for row_tokens, row_positions in _rows(counted(), tokenizer, seq_len):
        tokens.append(row_tokens)
        positions.append(row_positions)
    if not tokens:
        raise ValueError("there is no text to build rows from")
    return Rows(np.stack(tokens), np.stack(positions), text_bytes)


def streamed_batches(
    sources: Sequence[Iterable[str]],
    shares: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    batch_size: int,
    buffer_rows: int,
    seed: int,
    start: int = 0,
) -> Iterator[Batch]:
    """
    Batches from text that does not fit in memory, shuffled within a buffer of `buffer_rows` rows of each source.

    Args:
        sources: documents that are iterable again and again, one pass an epoch.
        shares: how often each source is drawn from, row by row.
        start: the first batch, reached by reading those before.
    """

    def shuffled_rows(documents: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        epoch = 0
        while True:
            rng, buffer, found = np.random.default_rng([seed, epoch]), [], False
            for row in _rows(documents, tokenizer, seq_len):
                found = True
                buffer.append(row)
                if len(buffer) >= buffer_rows:
                    yield buffer.pop(int(rng.integers(len(buffer))))
            if not found:
                raise ValueError("there is no text to build rows from")
            rng.shuffle(buffer)  # type: ignore[arg-type]
            yield from buffer
            epoch += 1

    def mixed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        streams, rng = [shuffled_rows(documents) for documents in sources], np.random.default_rng(seed)
        while True:
            yield next(streams[rng.choice(len(streams), p=shares) if len(streams) > 1 else 0])

    rows = islice(mixed(), start * batch_size, None)
    while True:
        tokens, positions = zip(*islice(rows, batch_size), strict=True)
        yield Rows(np.stack(tokens), np.stack(positions), 0).take(slice(None))


def _rows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Full pieces as they come; short ones into the first open row with room, the fullest row closed when needed."""
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: at least 2, one token to read and one to predict")
    open_rows: list[list[np.ndarray]] = []

    def room(row: list[np.ndarray]) -> int:
        return seq_len - sum(map(len, row))

    for piece in _pieces(documents, tokenizer, seq_len):
        if len(piece) == seq_len:
            yield _joined([piece], seq_len, tokenizer)
            continue
        fitting = next((row for row in open_rows if room(row) >= len(piece)), None)
        if fitting is not None:
            fitting.append(piece)
            continue
        if len(open_rows) == OPEN_ROWS:
            fullest = min(range(OPEN_ROWS), key=lambda index: room(open_rows[index]))
            yield _joined(open_rows.pop(fullest), seq_len, tokenizer)
        open_rows.append([piece])
    for row in open_rows:
        yield _joined(row, seq_len, tokenizer)


def _pieces(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[np.ndarray]:
    begin, end = begin_token(tokenizer), tokenizer.eos_token_id
    documents = iter(documents)
    while texts := list(islice(documents, TOKENIZED_AT_ONCE)):
        for ids in encode(tokenizer, texts):
            tokens = np.asarray(ids if end is None else [*ids, end], dtype=np.int32)
            for start in range(0, len(tokens), seq_len - 1):
                yield np.concatenate([np.array([begin], dtype=np.int32), tokens[start : start + seq_len - 1]])


def _joined(
    pieces: list[np.ndarray], seq_len: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else begin_token(tokenizer)
    tokens = np.full(seq_len, padding, dtype=np.int32)
    positions = np.full(seq_len, PADDING, dtype=np.int32)
    filled = np.concatenate(pieces)
    tokens[: len(filled)] = filled
    positions[: len(filled)] = np.concatenate([np.arange(len(piece)) for piece in pieces])
    return tokens, positions
