import json
import logging
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from free_transformer.data import (
    Rows,
    build_rows,
    byte_tokenizer,
    load_tokenizer,
    read_documents,
    streamed_batches,
    train_tokenizer,
)
from free_transformer.data.rows import OPEN_ROWS, begin_token
from free_transformer.synthetic_data import letters

TOKENIZER = byte_tokenizer()
BEGIN, END, PADDING = 256, 257, 258
STRANGE = ["", " a  b ", "\n\r\t", "é ü ß", "🙂🏽‍♀️ 日本語", "<|begin", "\x00\x7f", "don't  we'll", "a ,b . c"]


def pieces_of(rows: Rows) -> list[list[int]]:
    """Token lists of all pieces, in the order of the rows, checked to lie whole inside a row."""
    pieces: list[list[int]] = []
    for tokens, positions in zip(rows.tokens.tolist(), rows.positions.tolist(), strict=True):
        for index, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            if position == -1:
                assert positions[index:] == [-1] * (len(positions) - index)  # padding at the end alone
                assert token == PADDING
            elif position == 0:
                assert token == BEGIN
                pieces.append([token])
            else:
                assert position == positions[index - 1] + 1
                pieces[-1].append(token)
    return pieces


def cut(documents: list[str], seq_len: int) -> list[list[int]]:
    """The pieces that documents should be cut into."""
    streams = [[*document.encode(), END] for document in documents]
    width = seq_len - 1
    return [[BEGIN, *stream[i : i + width]] for stream in streams for i in range(0, len(stream), width)]


def rows_of(batches) -> list[tuple]:
    """Rows of batches as plain values, for sets and counts."""
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


def numbered(count: int, length: int = 7) -> list[str]:
    """Documents that fill a row of `length + 2` tokens each."""
    return [f"{index:0{length}d}" for index in range(count)]


@pytest.mark.parametrize("text", STRANGE)
def test_bytes_are_their_own_tokens(text):
    assert TOKENIZER(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert TOKENIZER.decode(list(text.encode())) == text


@given(st.text())
def test_any_text_comes_back_from_its_bytes(text):
    assert TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == list(text.encode())
    assert TOKENIZER.decode(list(text.encode())) == text


def test_a_text_begins_with_the_begin_token_and_special_ones_follow_the_bytes():
    assert TOKENIZER("é")["input_ids"] == [BEGIN, *"é".encode()]
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (BEGIN, END, PADDING)
    assert len(TOKENIZER) == 259
    assert begin_token(TOKENIZER) == BEGIN
    assert TOKENIZER.decode([BEGIN, 104, 105, END, PADDING], skip_special_tokens=True) == "hi"


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["abc", "a"], padding=True)
    assert batch["input_ids"] == [[BEGIN, 97, 98, 99], [PADDING, PADDING, BEGIN, 97]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("text", STRANGE)
def test_a_saved_tokenizer_comes_back_the_same(tmp_path, text, trained):
    tokenizer = train_tokenizer(["a b don't é " * 9], 265) if trained else TOKENIZER
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
        assert loaded.all_special_ids == tokenizer.all_special_ids


def test_load_tokenizer_knows_bytes():
    assert load_tokenizer("bytes")("hi")["input_ids"] == TOKENIZER("hi")["input_ids"]


@pytest.mark.parametrize("vocab_size", [259, 260, 280])
def test_a_trained_tokenizer_has_the_size_asked_for_and_takes_any_text(vocab_size):
    tokenizer = train_tokenizer(
        ["the cat sat on the mat with the other cat. " * 20, "häuser und mäuse " * 20], vocab_size
    )
    assert len(tokenizer) == vocab_size
    for text in STRANGE:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    shorter = len(tokenizer("the cat")["input_ids"]) < len(TOKENIZER("the cat")["input_ids"])
    assert shorter == (vocab_size > 259)
    assert tokenizer("x")["input_ids"][0] == begin_token(tokenizer)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=258: at least 259"):
        train_tokenizer(["text"], 258)


@pytest.mark.parametrize("name", ["nowhere/folder", "nobody-has-this-name"])
def test_a_tokenizer_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"tokenizer '{name}': no such folder, nor such a name on the hub") as error:
        load_tokenizer(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hi")
    with pytest.raises(ValueError, match="this folder has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_named(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ half")
    with pytest.raises(ValueError, match="tokenizer '"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_with_no_token_to_begin_with_is_refused(tmp_path):
    plain = byte_tokenizer()
    plain.bos_token = plain.eos_token = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a begin-of-text nor an end-of-text"):
        load_tokenizer(str(tmp_path))


def test_files_and_folders_are_read_by_name_each_file_a_document(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "c"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(f"text of {name}\n")
    (tmp_path / "single.txt").write_text("single")
    found = list(read_documents([tmp_path / "single.txt", str(tmp_path / "folder")]))
    assert found == ["single", *(f"text of {name}\n" for name in ("a/z.md", "b.txt", "c"))]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"nul \x00 byte"])
def test_what_is_no_text_in_a_folder_is_left_out_with_a_warning(tmp_path, caplog, content):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image.png").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(read_documents([tmp_path])) == ["good"]
    assert "left out" in caplog.text
    assert "image.png" in caplog.text


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n ")
    (tmp_path / "c.txt").write_text("c")
    assert list(read_documents([tmp_path])) == ["c"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_tables_hold_a_document_a_row(tmp_path, suffix, column):
    texts = ["one é 🙂", "two\nlines", "three"]
    path = tmp_path / f"table.{suffix}"
    write_table(path, {column: texts, "number": [1, 2, 3]})
    assert list(read_documents([path], column)) == texts
    assert list(read_documents([tmp_path], column)) == texts


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, suffix):
    path = tmp_path / f"table.{suffix}"
    write_table(path, {"body": ["a"], "title": ["b"]})
    with pytest.raises(ValueError, match=r"no column 'text'.*'body', 'title'") as error:
        list(read_documents([path]))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_numbers_is_refused(tmp_path, suffix):
    path = tmp_path / f"table.{suffix}"
    write_table(path, {"text": [1, 2]})
    with pytest.raises(ValueError, match="column 'text' holds int, not text"):
        list(read_documents([path]))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\x07\x08 no table", b'{"text": '])
def test_a_table_that_cannot_be_read_is_named_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"table.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"table.{suffix}") as error:
        list(read_documents([path]))
    assert "\n" not in str(error.value)


def write_table(path, columns: dict) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_letters_are_the_synthetic_task_of_a_count_and_a_seed():
    assert list(read_documents(["letters:5:3"])) == list(letters(5, 3))
    assert list(read_documents(["letters:4"])) == list(letters(4, 0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, "no such file or folder"),
        ("nowhere/", None, "no such file or folder"),
        ("./nowhere", None, "no such file or folder"),
        ("nobody-has-this-name", None, "no such file, folder or data set"),
        ("empty.txt", b"", "there is no text in it"),
        ("blank.txt", b" \n\n", "there is no text in it"),
        ("binary.txt", b"\x80\x81", r"not UTF-8 text \(byte 0\)"),
        ("nul.txt", b"a\x00b", "not text"),
        ("letters:0", None, "there is no text in it"),
    ],
)
def test_a_source_that_holds_no_text_is_named_in_one_line(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{name}: {message}") as error:
        list(read_documents([name]))
    assert "\n" not in str(error.value)


def test_no_source_at_all_is_refused():
    with pytest.raises(ValueError, match="no data"):
        list(read_documents([]))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no text in it"):
        list(read_documents([tmp_path]))


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
    with pytest.raises(ValueError, match=f"seq_len={seq_len}: at least 2"):
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


def test_an_epoch_holds_every_row_once_and_each_has_an_order_of_its_own():
    rows = build_rows(numbered(12), TOKENIZER, 9)
    assert len(rows) == 12
    batches = list(islice(rows.shuffled(4, seed=0), 9))
    epochs = [rows_of(batches[start : start + 3]) for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(map(tuple, rows.tokens.tolist()))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 100])
def test_starting_at_a_batch_is_skipping_those_before(start):
    rows = build_rows(numbered(11), TOKENIZER, 9)
    whole = rows_of(islice(rows.shuffled(3, seed=5), start, start + 8))
    assert rows_of(islice(rows.shuffled(3, seed=5, start=start), 8)) == whole


def test_order_follows_the_seed():
    rows = build_rows(numbered(20), TOKENIZER, 9)
    one, same, other = (rows_of(islice(rows.shuffled(5, seed), 4)) for seed in (0, 0, 1))
    assert one == same != other


def test_rows_that_fill_no_batch_are_refused_with_what_to_do():
    rows = build_rows(numbered(3), TOKENIZER, 9)
    with pytest.raises(ValueError, match=r"fills 3 rows of 9 tokens, fewer than batch_size=4.*smaller batch_size"):
        next(rows.shuffled(4, seed=0))


def test_rows_in_order_are_each_row_once():
    rows = build_rows(numbered(7), TOKENIZER, 9)
    batches = list(rows.in_order(3))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert rows_of(batches) == [tuple(row) for row in rows.tokens.tolist()]


@pytest.mark.parametrize("buffer_rows", [1, 4, 1000])
def test_streaming_gives_the_rows_of_an_epoch_then_of_the_next(buffer_rows):
    documents = [*numbered(13), "a" * 30, "b", "cc"]
    rows = build_rows(documents, TOKENIZER, 9)
    assert len(rows) % 2 == 0
    batches = streamed_batches([documents], [1.0], TOKENIZER, 9, 2, buffer_rows, seed=0)
    for _ in range(2):
        epoch = rows_of(islice(batches, len(rows) // 2))
        assert sorted(epoch) == sorted(map(tuple, rows.tokens.tolist()))


@pytest.mark.parametrize("start", [0, 1, 6, 13])
def test_streaming_from_a_batch_is_skipping_those_before(start):
    arguments = ([numbered(20)], [1.0], TOKENIZER, 9, 3, 5)
    whole = rows_of(islice(streamed_batches(*arguments, seed=2), start, start + 5))
    assert rows_of(islice(streamed_batches(*arguments, seed=2, start=start), 5)) == whole


def test_streaming_shuffles_by_its_seed_and_each_epoch_anew():
    one, same, other = (
        rows_of(islice(streamed_batches([numbered(20)], [1.0], TOKENIZER, 9, 5, 8, seed), 8)) for seed in (0, 0, 1)
    )
    assert one == same != other
    assert one[:20] != one[20:]
    assert one[:20] != sorted(one[:20])


def test_streamed_batches_have_the_labels_of_rows():
    documents = ["ab", "c" * 20]
    streamed = next(streamed_batches([documents], [1.0], TOKENIZER, 9, 4, 1, seed=0))
    whole = build_rows(documents, TOKENIZER, 9).take(slice(None))

    def labels_by_row(batch):
        return dict(zip(map(tuple, batch["input_ids"].tolist()), batch["labels"].tolist(), strict=True))

    assert labels_by_row(streamed) == labels_by_row(whole)


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
