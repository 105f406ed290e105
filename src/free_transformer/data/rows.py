"""
Rows of tokens: documents cut into windows, short ones packed together, boundaries kept.

A *piece* is a begin-of-text token and up to `seq_len - 1` tokens of one document: what has plans of its own. A
*row* is one piece, or several short ones side by side; positions start again at 0 with each piece and are -1 on
padding, so that rows need no other record of their boundaries.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data.tokenizer import CHUNK, begin_token, encode, encode_in_chunks
from free_transformer.model.losses import IGNORED
from free_transformer.runtime.byte_alphabet import utf8

Batch = dict[str, Tensor]

TOKENIZED_AT_ONCE = 64  # documents
CHARACTERS_AT_ONCE = 4 * CHUNK  # in them; tokenizing takes some 200 bytes of memory each
BLOCK = 4096  # rows of a mixture whose sources are drawn together
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
        documents: (D,) uint64, a hash of each document that the rows were built from, in the order of reading.
    """

    tokens: np.ndarray
    positions: np.ndarray
    text_bytes: int
    documents: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

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

    @property
    def digest(self) -> str:
        """A hash of all documents and their order, 32 hexadecimal digits."""
        return hashlib.blake2b(self.documents.astype("<u8").tobytes(), digest_size=16).hexdigest()

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
        """`size` rows drawn without replacement, or all of them; the bytes in proportion, all the documents' hashes."""
        if size >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:size])
        part = Rows(self.tokens[chosen], self.positions[chosen], 0, self.documents)
        part.text_bytes = round(self.bytes_per_token * part.predicted_tokens)
        return part

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Each row once."""
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
        Batches without end. Each epoch is a permutation of all rows, and the next one follows at once, so that a batch
        may hold rows of both.

        Args:
            start: number of rows to leave out at the beginning, reached without reading them. Counted in rows, so that
                a run can resume with another batch size.
            worker: of `workers`, which take turns: this one yields every `workers`-th batch, from its own number on.
            share: the rows of each batch to take, where several processes share it.

        Raises:
            ValueError: if the rows do not fill one batch.
        """
        if len(self) < batch_size:
            raise ValueError(
                f"the training text fills {len(self)} rows of {self.tokens.shape[1]} tokens, fewer than "
                f"batch_size={batch_size}: add text, or take a smaller batch_size or seq_len"
            )
        order = EpochOrder(len(self), [seed])
        for first in count(start + worker * batch_size, workers * batch_size):
            yield self.take(np.sort(order.take(first, first + batch_size))[share])


class EpochOrder:
    """
    An endless sequence of row numbers: a permutation of all rows in each epoch. It holds one permutation, so that
    what `take` costs does not depend on the number of rows, except at the beginning of an epoch.
    """

    def __init__(self, rows: int, seed: list[int]):
        self.rows, self.seed = rows, seed
        self.epoch = -1
        self.permutation = np.empty(0, dtype=np.int64)

    def take(self, start: int, stop: int) -> np.ndarray:
        """Row numbers at the places from `start` to `stop - 1` of the sequence."""
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
    An endless sequence of sources, one for each row, drawn with the probabilities `shares`.

    The number of rows of each source in a block of rows is drawn first, and their order within the block only when it
    is needed. A far block is reached by adding up these numbers.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        self.shares, self.seed = shares, seed
        self.rng = np.random.default_rng([seed, len(shares)])
        self.block = -1
        self.taken = self.counts = np.zeros(len(shares), dtype=np.int64)  # rows before the block, and in it
        self._skip(1)

    def taken_before(self, place: int) -> np.ndarray:
        """How often each source occurs before this place. Places must not decrease from call to call."""
        block, rest = divmod(place, BLOCK)
        while self.block < block:
            self._skip(min(block - self.block, BLOCK))
        return self.taken + np.bincount(self.order[:rest], minlength=len(self.shares))

    def _skip(self, blocks: int) -> None:
        drawn = self.rng.multinomial(BLOCK, self.shares, size=blocks)
        self.taken = self.taken + self.counts + drawn[:-1].sum(0)
        self.counts = drawn[-1]
        self.block += blocks
        # a seed without its trailing zeros is the same one, so [seed, len(shares), 0] would be that of the counts
        rng = np.random.default_rng([self.seed, len(self.shares) + 1, self.block])
        self.order = rng.permutation(np.repeat(np.arange(len(self.shares)), self.counts))


@dataclass
class MixedRows:
    """
    Rows of several sources, drawn in given shares; a source that is short is read more often.

    Attributes:
        parts: the rows of each source, of one length.
        shares: probability with which each source is drawn for a row; they add up to 1.
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
        self,
        batch_size: int,
        seed: int,
        start: int = 0,
        worker: int = 0,
        workers: int = 1,
        share: slice = slice(None),
    ) -> Iterator[Batch]:
        """As `Rows.shuffled`. A source is drawn for each row, and each source has epochs of its own."""
        sources = SourceOrder(self.shares, seed)
        orders = [EpochOrder(len(part), [seed, index]) for index, part in enumerate(self.parts)]
        for first in count(start + worker * batch_size, workers * batch_size):
            places = zip(sources.taken_before(first), sources.taken_before(first + batch_size), strict=True)
            drawn = [
                (part, np.sort(order.take(int(begin), int(end))))
                for part, order, (begin, end) in zip(self.parts, orders, places, strict=True)
            ]
            tokens = np.concatenate([part.tokens[rows] for part, rows in drawn])[share]
            positions = np.concatenate([part.positions[rows] for part, rows in drawn])[share]
            yield Rows(tokens, positions, 0).take(slice(None))


TrainingRows = Rows | MixedRows


def build_rows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Rows:
    """Reads all documents into rows of `seq_len` tokens. `ValueError` where there is nothing to predict."""
    tokens, positions, text_bytes, hashes = [], [], 0, array("Q")

    def counted() -> Iterator[str]:
        nonlocal text_bytes
        for document in documents:
            data = utf8(document)
            text_bytes += len(data)
            hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
            del data  # or it would stay in memory while the document is tokenized
            yield document

    for row_tokens, row_positions in _rows(counted(), tokenizer, seq_len):
        tokens.append(row_tokens)
        positions.append(row_positions)
    if not tokens:
        raise ValueError("there is no text to build rows from")
    stacked = np.stack(tokens)
    tokens.clear()
    return Rows(stacked, np.stack(positions), text_bytes, np.array(hashes, dtype=np.uint64))


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
        start: number of rows to leave out at the beginning, reached by reading them.
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

    rows = islice(mixed(), start, None)
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
    begin = np.array([begin_token(tokenizer)], dtype=np.int32)
    end = [] if tokenizer.eos_token_id is None else [[tokenizer.eos_token_id]]
    for chunks in _tokenized(documents, tokenizer):
        for window in _windows(chain(chunks, end), seq_len - 1):
            yield np.concatenate([begin, window])


def _tokenized(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Iterable[list[int]]]:
    """Each document's tokens, in one chunk, or in several where it is long."""
    for texts in _groups(documents):
        if len(texts) == 1:
            yield encode_in_chunks(tokenizer, texts.pop())
        else:
            yield from ([ids] for ids in encode(tokenizer, texts))


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents to tokenize at once: few enough for memory, and long ones alone."""
    group: list[str] = []
    size = 0
    for document in documents:
        alone = len(document) > CHUNK
        full = len(group) == TOKENIZED_AT_ONCE or size + len(document) > CHARACTERS_AT_ONCE
        if group and (alone or full):
            yield group
            group, size = [], 0
        if alone:
            yield [document]
        else:
            group.append(document)
            size += len(document)
    if group:
        yield group


def _windows(chunks: Iterable[Sequence[int]], width: int) -> Iterator[np.ndarray]:
    """The tokens of all chunks, `width` at a time, int32."""
    rest = np.empty(0, dtype=np.int32)
    for chunk in chunks:
        tokens = np.concatenate([rest, np.asarray(chunk, dtype=np.int32)])
        full = len(tokens) - len(tokens) % width
        yield from (tokens[start : start + width] for start in range(0, full, width))
        rest = tokens[full:]
    if len(rest):
        yield rest


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
