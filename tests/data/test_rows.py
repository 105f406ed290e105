"""Rows built from documents."""

import re

import numpy as np
import pytest
from data_cases import BEGIN, END, TOKENIZER, cut, numbered, pieces_of
from hypothesis import given
from hypothesis import strategies as st

from free_transformer.data import Rows, build_rows, byte_tokenizer, streamed_batches, train_tokenizer
from free_transformer.data.packing import OPEN_ROWS


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=150), st.integers(2, 24))
def test_every_token_of_every_document_is_there_once_and_in_order(documents, seq_len):
    rows = build_rows(documents, TOKENIZER, seq_len)
    assert rows.tokens.shape == rows.positions.shape == (len(rows), seq_len)
    expected = cut(documents, seq_len)
    assert sorted(pieces_of(rows)) == sorted(expected)
    assert rows.predicted_tokens == sum(len(piece) - 1 for piece in expected)
    assert rows.text_bytes == sum(len(document.encode()) for document in documents)
    assert rows.bytes_per_token == pytest.approx(rows.text_bytes / rows.predicted_tokens)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(2, 16))
def test_the_windows_of_a_document_keep_their_order(lengths, seq_len):
    """Full windows come as the text does, the rest of a document in any later row."""
    documents = [f"{index:02d}" + "x" * length for index, length in enumerate(lengths)]
    full = [piece for piece in pieces_of(build_rows(documents, TOKENIZER, seq_len)) if len(piece) == seq_len]
    wanted = [piece for piece in cut(documents, seq_len) if len(piece) == seq_len]
    assert full == wanted


@given(st.lists(st.integers(1, 14), min_size=1, max_size=200))
def test_short_pieces_are_packed_so_that_no_two_open_rows_could_be_one(lengths):
    rows = build_rows(["x" * length for length in lengths], TOKENIZER, 16)
    assert len(rows) <= len(lengths)
    if len(lengths) <= OPEN_ROWS:
        filled = (rows.positions >= 0).sum(1)
        assert sum(filled <= 8) <= 1


@pytest.mark.parametrize("sizes", [[7], [7, 7], [3, 2], [3, 1, 7], [2, 20]])
def test_a_batch_ignores_begin_tokens_and_padding_and_marks_documents(sizes):
    rows = build_rows(["y" * size for size in sizes], TOKENIZER, 9)
    batch = rows.take(slice(None))
    positions = rows.positions
    assert batch["input_ids"].numpy().tolist() == rows.tokens.tolist()
    counted = batch["labels"] != -100
    assert counted.numpy().tolist() == (positions > 0).tolist()
    assert (batch["labels"][counted] == batch["input_ids"][counted]).all()
    if (positions == np.arange(9)).all():
        assert batch.keys() == {"input_ids", "labels"}
    else:
        assert batch["attention_mask"].numpy().tolist() == (positions >= 0).astype(int).tolist()
        assert batch["position_ids"].numpy().tolist() == positions.clip(0).tolist()


def test_rows_that_are_full_of_one_document_carry_no_mask():
    rows = build_rows(["a" * 100], TOKENIZER, 11)
    assert rows.take(slice(0, 10)).keys() == {"input_ids", "labels"}
    assert "attention_mask" in rows.take(slice(10, 11))


@pytest.mark.parametrize("seq_len", [0, 1])
def test_a_row_too_short_to_predict_anything_is_refused(seq_len):
    with pytest.raises(ValueError, match=f"seq_len={seq_len}: must be at least 2"):
        build_rows(["text"], TOKENIZER, seq_len)


def test_no_documents_are_refused():
    with pytest.raises(ValueError, match="no text"):
        build_rows([], TOKENIZER, 8)
    with pytest.raises(ValueError, match="no text"):
        next(streamed_batches([[]], [1.0], TOKENIZER, 8, 2, 4, seed=0))


def test_a_tokenizer_without_begin_or_padding_takes_its_end_of_text():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.pad_token = None
    rows = build_rows(["ab"], tokenizer, 6)
    assert rows.tokens.tolist() == [[END, 97, 98, END, END, END]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, -1, -1]]


def test_special_tokens_in_the_text_of_a_document_stay_text():
    """A document that mentions the begin token must not begin a second one."""
    text = "a<|begin|>b<|end|>"
    rows = build_rows([text], TOKENIZER, 32)
    assert rows.tokens[0][: rows.predicted_tokens + 1].tolist() == [BEGIN, *text.encode(), END]


def test_bytes_per_token_of_a_trained_tokenizer_counts_bytes_of_text():
    tokenizer = train_tokenizer(["the cat sat. " * 30], 280)
    text = "the cat sät. " * 10
    rows = build_rows([text], tokenizer, 8)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    assert rows.predicted_tokens == tokens
    assert rows.bytes_per_token == pytest.approx(len(text.encode()) / tokens)


def test_a_sample_is_some_of_the_rows_and_their_share_of_the_bytes():
    rows = build_rows([*numbered(30), "".join(chr(230 + i) for i in range(40))], TOKENIZER, 9)
    part, same, other = rows.sample(10, seed=1), rows.sample(10, seed=1), rows.sample(10, seed=2)
    assert len(part) == 10
    assert part.tokens.tolist() == same.tokens.tolist() != other.tokens.tolist()
    chosen = [tuple(row) for row in part.tokens.tolist()]
    assert len(set(chosen)) == 10
    assert set(chosen) <= {tuple(row) for row in rows.tokens.tolist()}
    assert part.bytes_per_token == pytest.approx(rows.bytes_per_token, rel=0.01)


@pytest.mark.parametrize("size", [5, 6])
def test_a_sample_of_all_rows_is_the_rows(size):
    rows = build_rows(numbered(5), TOKENIZER, 9)
    assert rows.sample(size) is rows


def test_more_short_documents_than_open_rows_are_all_packed():
    documents = [chr(97 + index % 26) * (40 + index % 17) for index in range(300)]
    rows = build_rows(documents, byte_tokenizer(), 64)
    assert rows.predicted_tokens == sum(len(document) + 1 for document in documents)


def test_rows_of_three_arguments_have_no_documents():
    rows = build_rows(numbered(5), TOKENIZER, 9)
    plain = Rows(rows.tokens, rows.positions, rows.text_bytes)
    assert plain.documents.dtype == np.uint64
    assert len(plain.documents) == 0
    assert plain.digest == Rows(rows.tokens, rows.positions, 0).digest != rows.digest


@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=9), st.integers(2, 30))
def test_the_digest_tells_documents_and_their_order(texts, seq_len):
    rows = build_rows(texts, TOKENIZER, seq_len)
    assert re.fullmatch("[0-9a-f]{32}", rows.digest)
    assert rows.documents.dtype == np.uint64
    assert len(rows.documents) == len(texts)
    assert [texts.index(text) for text in texts] == [rows.documents.tolist().index(each) for each in rows.documents]
    assert rows.digest == build_rows(iter(texts), TOKENIZER, 12).digest  # whatever the length of rows
    assert (rows.digest == build_rows(texts[::-1], TOKENIZER, seq_len).digest) == (texts == texts[::-1])
    assert rows.digest != build_rows([*texts, "more"], TOKENIZER, seq_len).digest


def test_a_sample_keeps_the_hashes_of_all_documents():
    rows = build_rows(numbered(20), TOKENIZER, 9)
    assert rows.sample(3).digest == rows.digest


def test_documents_are_hashed_alike_on_every_machine():
    rows = build_rows(["a", "é"], TOKENIZER, 9)
    assert rows.documents.tolist() == [3405396810240292928, 3394012004367669963]
    assert rows.digest == "542db316a1540f6649dfdab8106a6c96"
