import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import os
import re
import sys
import tempfile
from collections import Counter
from functools import cache
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from free_transformer.data import (
    Rows,
    build_rows,
    byte_tokenizer,
    encode,
    fingerprint,
    is_path_source,
    load_tokenizer,
    read_documents,
    source_files,
    streamed_batches,
    tables,
    train_tokenizer,
    vocabulary_size,
)
from free_transformer.data import rows as rows_module
from free_transformer.data import tokenizer as tokenizer_module
from free_transformer.data.letters import letters
from free_transformer.data.rows import OPEN_ROWS, EpochOrder, begin_token
from free_transformer.files import MARKER

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


def fast(model, **parts) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


@pytest.mark.parametrize(("ids", "size"), [((0, 1, 2, 3), 4), ((0, 1, 50, 100), 101), ((9, 8, 7, 6), 10)])
def test_vocabulary_size_reaches_the_largest_id(ids, size):
    vocabulary = dict(zip(["<unk>", "<end>", "a", "b"], ids, strict=True))
    assert vocabulary_size(fast(models.WordLevel(vocabulary, unk_token="<unk>"))) == size


def test_vocabulary_size_of_bytes_is_their_number():
    assert vocabulary_size(TOKENIZER) == len(TOKENIZER) == 259


@given(st.text(max_size=9), st.characters(categories=["Cs"]), st.text(max_size=9))
def test_text_that_is_not_unicode_is_refused_with_its_place(before, surrogate, after):
    message = rf"^the text is not valid UTF-8: character {len(before)} is the lone surrogate '\\u"
    text = before + surrogate + after
    for use in (lambda: encode(TOKENIZER, ["fine", text]), lambda: build_rows([text], TOKENIZER, 8)):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("trained", [False, True])
def test_fingerprint_stays_the_same_in_use_and_when_saved(tmp_path, trained):
    tokenizer = train_tokenizer(["a b don't é " * 9], 275) if trained else byte_tokenizer()
    found = fingerprint(tokenizer)
    assert re.fullmatch("[0-9a-f]{32}", found)
    tokenizer(["abc", "a"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer) == found
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == found
    assert fingerprint(load_tokenizer(str(tmp_path))) == found


def test_fingerprints_differ_where_tokens_may():
    def bpe(vocabulary, merges, **parts):
        return fast(models.BPE(vocabulary, merges), **parts)

    vocabulary = {"<unk>": 0, "<end>": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "bc": 6}
    swapped = {**vocabulary, "a": 3, "b": 2}
    one, other = ("a", "b"), ("b", "c")
    without_end = bpe(vocabulary, [one, other])
    without_end.eos_token = None
    tokenizers = [
        bpe(vocabulary, [one, other]),
        bpe(vocabulary, [other, one]),
        bpe(swapped, [one, other]),
        bpe(vocabulary, [one, other], normalizer=normalizers.Lowercase()),
        bpe(vocabulary, [one, other], pre_tokenizer=pre_tokenizers.Whitespace()),
        without_end,
        train_tokenizer(["the cat"], 261),
        train_tokenizer(["a dog"], 261),
        byte_tokenizer(),
    ]
    assert len(set(map(fingerprint, tokenizers))) == len(tokenizers)


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
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text(json_lines(rows))


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_text(rows: list[dict], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet_bytes(columns: dict) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


TEXTS = ["one é 🙂", 'two\nlines, and a "word"', "three"]
OBJECTS = [{"number": number, "text": text} for number, text in enumerate(TEXTS)]
FORMATS = {
    ".jsonl": json_lines(OBJECTS).encode(),
    ".JSONL": json_lines(OBJECTS).encode(),
    ".ndjson": json_lines(OBJECTS).replace("\n", "\r\n").encode(),
    ".json": json_lines(OBJECTS).encode(),
    ".JSON": json.dumps(OBJECTS).encode(),
    ".pretty.json": json.dumps(OBJECTS, indent=2).encode(),
    ".rows.json": b"[\n" + b",\n".join(json.dumps(each).encode() for each in OBJECTS) + b"]\n",
    ".csv": csv_text(OBJECTS).encode(),
    ".Tsv": csv_text(OBJECTS, "\t").encode(),
    ".parquet": parquet_bytes({"number": [1, 2, 3], "text": TEXTS}),
}
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_tables_are_read_by_their_suffix_compressed_or_not(tmp_path, suffix, compression):
    path = tmp_path / f"table{suffix}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[suffix]))
    assert list(read_documents([path])) == TEXTS
    assert list(read_documents([tmp_path])) == TEXTS


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_text_files_are_read_compressed_or_not(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"one\r\ntwo\rthree\n"))
    assert list(read_documents([path])) == ["one\ntwo\nthree\n"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_may_hold_one_object(tmp_path, indent):
    (tmp_path / "one.json").write_text(json.dumps(OBJECTS[0], indent=indent))
    assert list(read_documents([tmp_path / "one.json"])) == TEXTS[:1]


MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "é\n"),
        ("a.jsonl", '{"text": "é\\n"}'),
        ("a.json", '["no row", {"text": "é\\n"}]'),
        ("a.csv", 'text,id\n"é\n",1\n'),
        ("a.txt.gz", "é\n"),
    ],
)
def test_byte_order_mark_is_left_out_and_names_the_encoding(tmp_path, name, content, encoding):
    data = MARKS[encoding] + content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_documents([tmp_path / name])) == ["é\n"]


def test_damaged_utf_16_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + "text".encode("utf-16-le") + b"x")
    with pytest.raises(ValueError, match=r"a.txt: not UTF-16 text \(byte 10\)"):
        list(read_documents([tmp_path / "a.txt"]))


ROWS = st.one_of(
    st.text(min_size=1, max_size=9).map(lambda text: (json.dumps({"text": "x" + text}), "x" + text)),
    st.sampled_from(
        [
            "no JSON",
            '{"text": "half',
            "null",
            '["text"]',
            '{"body": "no text"}',
            '{"text": null}',
            '{"text": 3}',
            '{"text": ["a"]}',
            '{"text": "\\ud800"}',
            '{"text": "\udce9"}',  # a byte that is not UTF-8
            "[" * 100_000,
        ]
    ).map(lambda line: (line, None)),
)


@given(st.lists(ROWS, max_size=12))
def test_good_rows_are_read_and_bad_ones_counted(lines):
    texts = [text for _, text in lines if text is not None]
    bad = [number for number, (_, text) in enumerate(lines, 1) if text is None]
    with tempfile.TemporaryDirectory() as folder, captured_warnings() as warnings:
        path = Path(folder) / "a.jsonl"
        path.write_bytes("\n".join(line for line, _ in lines).encode(errors="surrogateescape"))
        if not texts:
            with pytest.raises(ValueError, match=r"a.jsonl: ") as error:
                list(read_documents([path]))
            assert "\n" not in str(error.value)
            return
        assert list(read_documents([path])) == texts
        assert list(read_documents([path])) == texts  # the next epoch
    if bad:
        (warning,) = warnings
        assert f"{path}: skipped {len(bad)} bad row" in warning
        assert re.findall(r"line (\d+) \(", warning) == [str(number) for number in bad[:3]]
    else:
        assert not warnings


class captured_warnings(logging.Handler):
    """The warnings of the library, without pytest's fixture, which hypothesis does not take."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        tables.warn_once.cache_clear()  # a folder of the same name may have been there before
        logging.getLogger("free_transformer").addHandler(self)
        return self.messages

    def __exit__(self, *_):
        logging.getLogger("free_transformer").removeHandler(self)


def test_other_columns_may_change_their_type(tmp_path):
    rows = [{"text": "a", "other": other} for other in (None, 1, "s", [1], {"x": None}, float("nan"))]
    (tmp_path / "a.jsonl").write_text(json_lines(rows))
    assert list(read_documents([tmp_path / "a.jsonl"])) == ["a"] * 6


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_more_bad_rows_than_allowed_are_refused(tmp_path, suffix, in_folder):
    path = tmp_path / f"a{suffix}"
    write_table(path, {"text": [None, "one", None, "two", None]})
    source = tmp_path if in_folder else path
    assert list(read_documents([source], max_bad_rows=3)) == ["one", "two"]
    for allowed in (0, 1, 2):
        message = rf"a{suffix}: .* bad rows?: (line|row) 1 .*data.max_bad_rows={allowed} .*data.column.*'text'"
        with pytest.raises(ValueError, match=message) as error:
            list(read_documents([source], max_bad_rows=allowed))
        assert "\n" not in str(error.value)


def test_a_table_without_the_column_is_left_out_of_a_folder_as_a_whole(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json_lines([{"title": "x"}] * 500))
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "c.csv").write_text("title\nx\n")
    assert list(read_documents([tmp_path])) == ["bee"]
    assert re.search(r"left out: .*a.jsonl: no column 'text' \(data.column\); it has 'title'", caplog.text)
    assert re.search(r"left out: .*c.csv: no column 'text' \(data.column\); it has 'title'", caplog.text)


def test_a_wrong_column_is_found_out_without_reading_a_large_table_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_SEARCHED", 200)
    (tmp_path / "a.jsonl").write_text(json_lines([{"title": "x"}] * 300 + [{"text": "good"}]))
    with pytest.raises(ValueError, match="no column 'text'"):
        list(read_documents([tmp_path / "a.jsonl"]))
    monkeypatch.setattr(tables, "MAX_SEARCHED", 400)
    with pytest.raises(ValueError, match=r"300 bad rows: .*data.max_bad_rows=100"):
        list(read_documents([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_a_table_that_breaks_off_is_said_to_be_read_in_part(tmp_path, caplog, compression):
    texts = [os.urandom(20).hex() for _ in range(40_000)]
    data = COMPRESSIONS.get(compression, lzma.compress)(json_lines([{"text": text} for text in texts]).encode())
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(data[: len(data) * 3 // 4])
    (tmp_path / "b.txt").write_text("bee")
    *read, last = read_documents([tmp_path])
    assert last == "bee"
    assert 0 < len(read) < len(texts)
    assert read == texts[: len(read)]
    assert f"only the first {len(read)} rows were read" in caplog.text
    assert "left out" not in caplog.text
    with pytest.raises(ValueError, match=rf"a.jsonl{compression}: breaks off after line {len(read)} ") as error:
        list(read_documents([path]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.bz2", "a.csv.xz", "a.parquet.zst", "a.json.gz"])
def test_what_is_not_compressed_as_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text")
    with pytest.raises(ValueError, match=f"{name}: cannot be read") as error:
        list(read_documents([tmp_path / name]))
    assert "\n" not in str(error.value)


def test_fields_of_csv_may_be_long_and_have_line_breaks(tmp_path):
    texts = ["x" * 300_000, "a\nb\r\n\nc", ' "quoted", and more', "="]
    (tmp_path / "a.csv").write_bytes(csv_text([{"id": "1", "text": text} for text in texts]).encode())
    assert list(read_documents([tmp_path / "a.csv"])) == texts


def test_bad_rows_of_csv_are_named_by_their_line(tmp_path, caplog):
    lines = ["id,text,more", '1,"a', 'b",', "2,a comma, too many,", "3", "4,nul \0 here,", "", "5\0,fine,", "6,last"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert list(read_documents([tmp_path / "a.csv"])) == ["a\nb", "fine", "last"]
    expected = (
        "a.csv: skipped 3 bad rows: line 4 (4 fields under 3 columns), line 5 (no column 'text'), "
        "line 6 (column 'text' has NUL bytes)"
    )
    assert expected in caplog.text


def test_a_quotation_mark_that_is_never_closed_is_named(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text('text\tid\none\t1\n"two\t2\nthree\t3\n')
    with pytest.raises(ValueError, match=r"a.tsv: breaks off after line 2 \(the quotation mark that opens in line 3"):
        list(read_documents([tmp_path / "a.tsv"]))
    assert list(read_documents([tmp_path])) == ["one"]
    assert "only the first 1 rows were read" in caplog.text


def test_names_of_columns_in_a_message_are_few_and_short(tmp_path):
    (tmp_path / "a.csv").write_text(",".join(["long" * 100] * 50) + "\n1\n")
    with pytest.raises(ValueError, match="no column 'text'") as error:
        list(read_documents([tmp_path / "a.csv"]))
    assert len(str(error.value)) < 700


def test_damaged_text_in_parquet_is_a_bad_row(tmp_path, caplog):
    damaged = pyarrow.array([b"good", b"\xff", None, b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": damaged}), tmp_path / "a.parquet")
    assert list(read_documents([tmp_path / "a.parquet"])) == ["good", "fine"]
    assert "a.parquet: skipped 2 bad rows: row 2 (not UTF-8 text), row 3 (column 'text' holds null)" in caplog.text


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((name, b"") for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt.gz", "a.jsonl.xz")),
        ("a.jsonl", b"\n \n"),
        ("a.jsonl", codecs.BOM_UTF8),
        ("a.json", b"[]"),
        ("a.csv", b"text,id\n"),
        ("a.csv", b"text,id\n\n,1\n"),
        ("a.jsonl", b'{"text": ""}\n{"text": " "}'),
        ("a.parquet", parquet_bytes({"text": pyarrow.array([], pyarrow.string())})),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_a_table_without_text_is_named_like_an_empty_text_file(tmp_path, monkeypatch, name, data):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^{name}: there is no text in it$"):
        list(read_documents([name]))


def test_a_table_without_rows_still_needs_the_column(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes({"body": pyarrow.array([], pyarrow.string())}))
    with pytest.raises(ValueError, match=r"no column 'text'.*'body'"):
        list(read_documents([tmp_path / "a.parquet"]))


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_a_library_that_is_missing_is_named_even_in_a_folder(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"data")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=rf"{name}: .*pip install 'free-transformer-lm\[train\]'"):
        list(read_documents([tmp_path]))


class Hub:
    """Stands in for `datasets.load_dataset`: data sets by name and configuration, then by split."""

    def __init__(self, **data_sets):
        self.data_sets, self.asked = data_sets, []

    def __call__(self, *names, split, streaming):
        assert streaming
        self.asked.append((names, split))
        splits = self.data_sets[names[0].split("/")[-1]]
        if split not in splits:
            raise ValueError(f"Bad split: {split}. Available splits: {list(splits)}")
        return splits[split]


def rows_from(*texts) -> list[dict]:
    return [{"text": text} for text in texts]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub = Hub(corpus={"train": rows_from("train one", "train two"), "test": rows_from("test")})
    monkeypatch.setattr(datasets, "load_dataset", hub)
    return hub


@pytest.mark.parametrize("prefix", ["", "hub:"])
@pytest.mark.parametrize(
    ("name", "asked", "texts"),
    [
        ("corpus", (("corpus",), "train"), ["train one", "train two"]),
        ("corpus[test]", (("corpus",), "test"), ["test"]),
        ("corpus:20231101.en", (("corpus", "20231101.en"), "train"), ["train one", "train two"]),
        ("owner/corpus:en-v1[test]", (("owner/corpus", "en-v1"), "test"), ["test"]),
    ],
)
def test_a_data_set_is_named_with_its_configuration_and_split(hub, prefix, name, asked, texts):
    assert list(read_documents([prefix + name])) == texts
    assert hub.asked == [asked]


def test_the_split_of_data_sets_that_name_none_is_given(hub):
    assert list(read_documents(["corpus", "corpus[train]"], split="test")) == ["test", "train one", "train two"]


@pytest.mark.parametrize("name", ["corpus", "corpus:en", "corpus[validation]", "hub:corpus"])
def test_a_split_that_is_missing_is_named_with_those_that_are_there(hub, name):
    shown = re.escape(name.removesuffix("[validation]"))
    message = rf"^{re.escape(name)}: no split 'validation'; .*{shown}\[test\] .*\['train', 'test'\]"
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents([name], split="validation"))
    assert "\n" not in str(error.value)


def test_a_file_or_folder_goes_before_a_data_set_of_its_name_unless_told(hub):
    Path("corpus").mkdir()
    Path("corpus/a.txt").write_text("of the folder")
    assert list(read_documents(["corpus"])) == ["of the folder"]
    assert list(read_documents(["hub:corpus"])) == ["train one", "train two"]
    assert hub.asked == [(("hf://datasets/corpus",), "train")]  # else `datasets` would read the folder as well


@pytest.mark.parametrize("name", ["hub:", "corpus[]", "corpus:", "hub:[test]"])
def test_a_malformed_name_of_a_data_set_is_refused(hub, name):
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: not a data set; write name, name:configuration"):
        list(read_documents([name]))
    assert not hub.asked


def test_bad_rows_of_data_sets_are_skipped_up_to_their_limit(hub, caplog):
    hub.data_sets["flawed"] = {"train": rows_from("one", None, "two", "\ud800", 5)}
    assert list(read_documents(["flawed"], max_bad_rows=3)) == ["one", "two"]
    assert "flawed: skipped 3 bad rows: row 2 (column 'text' holds null), row 4 " in caplog.text
    with pytest.raises(ValueError, match=r"flawed: 3 bad rows: row 2 .*data.max_bad_rows=2"):
        list(read_documents(["flawed"], max_bad_rows=2))
    with pytest.raises(ValueError, match=r"flawed: no column 'body' .*'text'"):
        list(read_documents(["flawed"], "body"))


def test_a_data_set_that_breaks_off_is_named_with_the_row(hub):
    def rows():
        yield from rows_from("one", "two")
        raise ConnectionError("the hub\nis gone")

    hub.data_sets["broken"] = {"train": rows()}
    with pytest.raises(ValueError, match=r"^broken: breaks off after row 2 \(the hub\)$"):
        list(read_documents(["broken"]))


@pytest.mark.parametrize(
    ("source", "is_path"),
    [
        ("exists", True),
        ("exists[test]", False),
        ("is[1]", True),
        ("hub:exists", False),
        ("letters:5", False),
        ("letters:5:3", False),
        ("letters:many", False),
        ("corpus", False),
        ("owner/corpus", False),
        ("wikimedia/wikipedia:20231101.en", False),
        ("corpus[train[:10%]]", False),
        ("nowhere.txt", True),
        ("owner/nowhere.jsonl", True),
        ("nowhere/", True),
        ("./nowhere", True),
        ("../nowhere", True),
        ("/nowhere", True),
        ("~/nowhere", True),
        ("two/folders/deep", True),
        ("with a space", True),
        ("nowhere:a/b", True),
        ("x" * 5000, False),
        ("long text. " * 500, True),
    ],
)
def test_a_source_is_told_to_be_a_path_or_not(tmp_path, monkeypatch, source, is_path):
    monkeypatch.chdir(tmp_path)
    Path("exists").mkdir()
    Path("is[1]").write_text("text")
    assert is_path_source(source) == is_path


def test_source_files_are_those_that_are_read_in_that_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a/z.md", "a/.hidden", "c.jsonl", "single.txt"):
        path = tmp_path / ("." if name == "single.txt" else "folder") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}))
    sources = ["single.txt", "letters:3", str(tmp_path / "folder"), "corpus", "hub:folder", "nowhere.txt"]
    found = source_files(sources)
    assert found == [Path("single.txt"), *(tmp_path / "folder" / name for name in ("a/z.md", "b.txt", "c.jsonl"))]
    assert list(read_documents(found)) == list(read_documents(["single.txt", "folder"]))


@pytest.mark.parametrize("source", ["letters:", "letters:many", "letters:5:", "letters:5:3:1"])
def test_malformed_letters_are_refused(source):
    with pytest.raises(ValueError, match=f"^{source}: the synthetic task is letters:COUNT or letters:COUNT:SEED"):
        list(read_documents([source]))


@pytest.mark.parametrize("name", ["~/nowhere", "two/folders/deep", "long text. " * 500, "nul\0"])
def test_a_path_that_is_missing_is_never_taken_for_a_data_set(hub, name):
    with pytest.raises(ValueError, match=r"no such file or folder|cannot be read \(.*(too long|null)"):
        list(read_documents([name]))
    assert not hub.asked


def test_a_data_set_whose_name_looks_like_a_file_can_be_named(hub):
    with pytest.raises(ValueError, match=r"owner/corpus.v2: no such file or folder; .* is hub:owner/corpus.v2"):
        list(read_documents(["owner/corpus.v2"]))


def test_what_is_neither_file_nor_folder_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: neither a file nor a folder"):
        list(read_documents([tmp_path / "pipe"]))


def test_letters_are_the_synthetic_task_of_a_count_and_a_seed():
    assert list(read_documents(["letters:5:3"])) == list(letters(5, 3))
    assert list(read_documents(["letters:4"])) == list(letters(4, 0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.txt", None, "no such file or folder$"),
        ("nowhere.JSONL", None, "no such file or folder$"),
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


def test_a_source_without_a_name_is_refused():
    """`Path("")` is the current folder, which nobody named."""
    assert not is_path_source("")
    assert source_files([""]) == []
    with pytest.raises(ValueError, match="a source has no name"):
        list(read_documents([""]))


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


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 3), st.integers(0, 200))
def test_the_order_of_rows_is_a_permutation_in_each_epoch(count, seed, index, start):
    expected = np.concatenate(
        [np.random.default_rng([seed, index, epoch]).permutation(count) for epoch in range(start // count + 4)]
    )
    order = EpochOrder(count, [seed, index])
    stop = start + 2 * count + 1
    assert order.take(start, stop).tolist() == expected[start:stop].tolist()
    assert order.take(stop, stop).tolist() == []


@pytest.mark.parametrize("rows", [255, 256, 70_000])
def test_an_order_is_kept_in_few_bytes_and_drawn_once_an_epoch(monkeypatch, rows):
    drawn, original = [], np.random.default_rng

    def default_rng(seed):
        drawn.append(seed)
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    order = EpochOrder(rows, [7])
    for start in range(0, rows * 2, 85):
        order.take(start, min(start + 85, rows * 2))
    assert len(drawn) <= 4  # a place in both epochs may go back and forth once
    assert drawn[0] == [7, 0]
    assert order.permutation.itemsize <= 4
    assert sorted(order.permutation.tolist()) == list(range(rows))


def test_an_epoch_holds_every_row_once_and_each_has_an_order_of_its_own():
    rows = build_rows(numbered(12), TOKENIZER, 9)
    assert len(rows) == 12
    batches = list(islice(rows.shuffled(4, seed=0), 9))
    epochs = [rows_of(batches[start : start + 3]) for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(map(tuple, rows.tokens.tolist()))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_no_row_is_dropped_where_batches_do_not_fill_an_epoch():
    rows = build_rows(numbered(11), TOKENIZER, 9)
    read = Counter(rows_of(islice(rows.shuffled(3, seed=5), 11)))
    assert read == Counter({tuple(row): 3 for row in rows.tokens.tolist()})


@given(st.integers(0, 60), st.integers(1, 11), st.integers(1, 11))
def test_a_run_may_go_on_at_any_row_with_another_batch_size(start, first_size, second_size):
    """Which rows are read does not depend on the size of the batches that they are read in."""
    rows = build_rows(numbered(11), TOKENIZER, 9)
    order = EpochOrder(len(rows), [5]).take(0, 200)
    expected = [tuple(row) for row in rows.tokens[order].tolist()]
    batches = list(islice(rows.shuffled(first_size, 5), start // first_size))
    at = len(batches) * first_size
    batches += islice(rows.shuffled(second_size, 5, at), 3)
    assert Counter(rows_of(batches)) == Counter(expected[: at + 3 * second_size])


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 9))
def test_workers_take_turns_and_processes_share(start, workers, batch_size):
    rows = build_rows(numbered(11), TOKENIZER, 9)
    whole = [rows_of([batch]) for batch in islice(rows.shuffled(batch_size, 5, start), 2 * workers)]
    half = batch_size // 2
    for worker in range(workers):
        own = rows.shuffled(batch_size, 5, start, worker, workers)
        assert [rows_of([batch]) for batch in islice(own, 2)] == whole[worker::workers]
        left, right = (
            rows_of([next(rows.shuffled(batch_size, 5, start, worker, workers, share))])
            for share in (slice(0, half), slice(half, batch_size))
        )
        assert left + right == whole[worker]


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


@pytest.mark.parametrize("start", [0, 1, 6, 13, 41])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_streaming_from_a_row_is_skipping_those_before(start, batch_size):
    whole = rows_of(islice(streamed_batches([numbered(20)], [1.0], TOKENIZER, 9, 5, 5, seed=2), 20))
    later = streamed_batches([numbered(20)], [1.0], TOKENIZER, 9, batch_size, 5, seed=2, start=start)
    assert rows_of(islice(later, 5)) == whole[start : start + 5 * batch_size]


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


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "naïve",
    "Ärger,",
    "don't",
    "x",
    "日本語。",
    "🙂",
    "3.14",
    "hello-world",
    "aaaaaaaa",
]


@cache
def prose(seed: int = 0, count: int = 1200) -> str:
    """Words between single and double spaces, line breaks and tabs."""
    rng = np.random.default_rng(seed)
    between = rng.choice([" ", "  ", "\n", "\n\n", "\t", " \n"], count, p=[0.7, 0.08, 0.1, 0.04, 0.04, 0.04])
    return "".join(word + space for word, space in zip(rng.choice(WORDS, count), between, strict=True))


@cache
def tokenizers_of_many_kinds() -> dict[str, PreTrainedTokenizerFast]:
    def trained(tokenizer: Tokenizer, trainer) -> PreTrainedTokenizerFast:
        tokenizer.train_from_iterator([prose(seed) for seed in range(3)], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")

    special = {"special_tokens": ["<unk>", "<end>"], "show_progress": False}
    unigram = {"vocab_size": 120, "unk_token": "<unk>", **special}
    split, whole, prepending, across, stripping, word_piece = (
        *(Tokenizer(models.Unigram()) for _ in range(3)),
        *(Tokenizer(models.BPE(unk_token="<unk>")) for _ in range(2)),
        Tokenizer(models.WordPiece(unk_token="<unk>")),
    )
    split.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    prepending.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    across.normalizer = normalizers.Replace(" ", "▁")  # without a pre-tokenizer, tokens reach from word to word
    stripping.normalizer = normalizers.Strip()
    stripping.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    word_piece.normalizer = normalizers.BertNormalizer()
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return {
        "bytes": byte_tokenizer(),
        "BPE": train_tokenizer([prose(seed) for seed in range(3)], 340),
        "Unigram": trained(split, trainers.UnigramTrainer(**unigram)),
        "Unigram across words": trained(whole, trainers.UnigramTrainer(**unigram)),
        "Unigram with a mark before each text": trained(prepending, trainers.UnigramTrainer(**unigram)),
        "BPE across words": trained(across, trainers.BpeTrainer(vocab_size=300, **special)),
        "BPE that strips": trained(stripping, trainers.BpeTrainer(vocab_size=300, **special)),
        "WordPiece": trained(word_piece, trainers.WordPieceTrainer(vocab_size=150, **special)),
    }


KINDS = [
    "bytes",
    "BPE",
    "Unigram",
    "Unigram across words",
    "Unigram with a mark before each text",
    "BPE across words",
    "BPE that strips",
    "WordPiece",
]
CUT = {"bytes", "BPE", "Unigram", "WordPiece", "BPE across words"}  # the others may or must keep long texts whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 50, 333, 2000])
def test_a_long_text_has_the_tokens_of_encoding_it_whole(monkeypatch, kind, chunk):
    tokenizer = tokenizers_of_many_kinds()[kind]
    monkeypatch.setattr(tokenizer_module, "CHUNK", chunk)
    for seed in range(3):
        text = prose(seed, 1200 if chunk > 1 else 60)
        chunks = list(tokenizer_module.encode_in_chunks(tokenizer, text))
        assert list(chain.from_iterable(chunks)) == encode(tokenizer, [text])[0]
        if kind in CUT and chunk > 1:
            assert len(chunks) > len(text) / chunk / 4


@pytest.mark.parametrize("kind", ["bytes", "BPE"])
@given(text=st.text(st.sampled_from("ab \n\té日🙂"), max_size=300), chunk=st.integers(1, 40))
def test_any_text_has_the_tokens_of_encoding_it_whole(kind, text, chunk):
    tokenizer = tokenizers_of_many_kinds()[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "CHUNK", chunk)
        patch.setattr(rows_module, "CHUNK", chunk)
        chunks = tokenizer_module.encode_in_chunks(tokenizer, text)
        assert list(chain.from_iterable(chunks)) == encode(tokenizer, [text])[0]
        documents = ["x", text, "", "y" * 30, text]
        chunked = build_rows(documents, tokenizer, 7)
    whole = build_rows(documents, tokenizer, 7)
    assert chunked.tokens.tolist() == whole.tokens.tolist()
    assert chunked.positions.tolist() == whole.positions.tolist()
    assert chunked.digest == whole.digest


class Counting:
    """A tokenizer that notes how many characters it is given at once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.sizes = tokenizer, []

    def __call__(self, texts, **options):
        self.sizes.append(sum(map(len, texts)))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("unit", ["the cat sat on the mat. ", "ACGT", "日本語", "line\n"])
def test_a_large_document_is_tokenized_in_parts_as_it_is_read(unit):
    tokenizer = Counting(TOKENIZER)
    text = unit * (600_000 // len(unit))
    next(streamed_batches([[text]], [1.0], tokenizer, 64, 2, 4, seed=0))
    assert max(tokenizer.sizes) < 70_000
    assert sum(tokenizer.sizes) < 150_000
    rows = build_rows([text], tokenizer, 1024)
    assert max(tokenizer.sizes) < 70_000
    assert sum(map(len, pieces_of(rows))) - len(rows) == len(text.encode()) + 1


def test_few_characters_are_tokenized_at_once():
    tokenizer = Counting(TOKENIZER)
    rows = build_rows(["x" * 60_000] * 20, tokenizer, 1000)
    assert max(tokenizer.sizes) <= rows_module.CHARACTERS_AT_ONCE
    assert rows.predicted_tokens == 20 * 60_001


def test_saved_data_sets_are_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": ["one", "two"], "test": ["three"]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    assert list(read_documents([tmp_path / "saved"])) == ["one", "two"]
    assert list(read_documents([str(tmp_path / "saved" / "test")])) == ["three"]
    with pytest.raises(ValueError, match=r"no split 'validation'; name the folder of one: train, test"):
        list(read_documents([tmp_path / "saved"], split="validation"))


def test_folders_that_we_write_are_no_text(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "README.md").write_text("a card")
    (tmp_path / "run" / MARKER).write_text("{}")
    assert list(read_documents([tmp_path])) == ["mine"]
    assert source_files([tmp_path]) == [tmp_path / "mine.txt"]
