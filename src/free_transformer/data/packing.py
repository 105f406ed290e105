"""Builds rows from documents: tokenizes them, cuts them into pieces and packs short pieces (see `rows.py`)."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from free_transformer.data.rows import PADDING, Batch, Rows
from free_transformer.data.tokenizer import CHUNK, begin_token, encode, encode_in_chunks
from free_transformer.errors import InputError
from free_transformer.runtime.byte_alphabet import utf8

TOKENIZED_AT_ONCE = 64  # documents per tokenizer call
CHARACTERS_AT_ONCE = 4 * CHUNK  # per tokenizer call; tokenizing takes some 200 bytes of memory per character
OPEN_ROWS = 64  # rows kept open while short pieces are packed

PackedRow = tuple[np.ndarray, np.ndarray]  # tokens and positions, (T,) int32 each


def build_rows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Rows:
    """
    Reads all documents into rows of `seq_len` tokens.

    Raises:
        InputError: if there are no documents, a document is not valid Unicode, or `seq_len` is less than 2.
    """
    tokens, positions, text_bytes, hashes = [], [], 0, array("Q")

    def counted() -> Iterator[str]:
        nonlocal text_bytes
        for document in documents:
            data = utf8(document)
            text_bytes += len(data)
            hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
            del data  # free memory before the document is tokenized
            yield document

    for row_tokens, row_positions in _packed_rows(counted(), tokenizer, seq_len):
        tokens.append(row_tokens)
        positions.append(row_positions)
    if not tokens:
        raise InputError("there is no text to build rows from")
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
    Yields an endless stream of batches from text that does not fit in memory, shuffled within a buffer.

    Args:
        sources: documents of each source. Each must be iterable repeatedly: every epoch iterates once.
        shares: probability of each source for a row; they add up to 1.
        buffer_rows: number of rows per source in the shuffle buffer.
        start: number of rows to skip at the beginning; they are read and discarded.

    Raises:
        InputError: if a source has no documents, a document is not valid Unicode, or `seq_len` is less than 2.
    """

    def mixed() -> Iterator[PackedRow]:
        streams = [_shuffled_rows(documents, tokenizer, seq_len, buffer_rows, seed) for documents in sources]
        rng = np.random.default_rng(seed)
        while True:
            yield next(streams[rng.choice(len(streams), p=shares) if len(streams) > 1 else 0])

    rows = islice(mixed(), start, None)
    while True:
        tokens, positions = zip(*islice(rows, batch_size), strict=True)
        yield Rows(np.stack(tokens), np.stack(positions), 0).take(slice(None))


def _shuffled_rows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, buffer_rows: int, seed: int
) -> Iterator[PackedRow]:
    """Yields an endless stream of rows of one source, epoch after epoch, shuffled within a buffer."""
    epoch = 0
    while True:
        rng, found = np.random.default_rng([seed, epoch]), False
        buffer: list[PackedRow] = []
        for row in _packed_rows(documents, tokenizer, seq_len):
            found = True
            buffer.append(row)
            if len(buffer) >= buffer_rows:
                yield buffer.pop(int(rng.integers(len(buffer))))
        if not found:
            raise InputError("there is no text to build rows from")
        rng.shuffle(buffer)
        yield from buffer
        epoch += 1


def _packed_rows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Iterator[PackedRow]:
    """
    Packs pieces of documents into rows.

    Full pieces are yielded immediately. Short pieces go into the first open row with enough room. When too many rows
    are open, the fullest one is yielded.
    """
    if seq_len < 2:
        raise InputError(f"seq_len={seq_len}: must be at least 2, one token to read and one to predict")
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
    """Yields the tokens of each document, in several chunks if the document is long."""
    for texts in _groups(documents):
        if len(texts) == 1:
            yield encode_in_chunks(tokenizer, texts.pop())
        else:
            yield from ([ids] for ids in encode(tokenizer, texts))


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents for tokenizer calls with bounded memory. A long document forms its own group."""
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
    """Yields the tokens of all chunks, `width` at a time, int32. The last window may be shorter."""
    rest = np.empty(0, dtype=np.int32)
    for chunk in chunks:
        tokens = np.concatenate([rest, np.asarray(chunk, dtype=np.int32)])
        full = len(tokens) - len(tokens) % width
        yield from (tokens[start : start + width] for start in range(0, full, width))
        rest = tokens[full:]
    if len(rest):
        yield rest


def _joined(pieces: list[np.ndarray], seq_len: int, tokenizer: PreTrainedTokenizerBase) -> PackedRow:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else begin_token(tokenizer)
    tokens = np.full(seq_len, padding, dtype=np.int32)
    positions = np.full(seq_len, PADDING, dtype=np.int32)
    filled = np.concatenate(pieces)
    tokens[: len(filled)] = filled
    positions[: len(filled)] = np.concatenate([np.arange(len(piece)) for piece in pieces])
    return tokens, positions
