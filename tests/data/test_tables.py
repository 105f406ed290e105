"""Documents from JSON, CSV and Parquet tables."""

import codecs
import gzip
import json
import logging
import lzma
import os
import re
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_cases import COMPRESSIONS, FORMATS, OBJECTS, TEXTS, csv_text, json_lines, parquet_bytes, write_table
from hypothesis import given
from hypothesis import strategies as st

from free_transformer.data import read_documents, tables


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


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_tables_are_read_by_their_suffix_compressed_or_not(tmp_path, suffix, compression):
    path = tmp_path / f"table{suffix}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[suffix]))
    assert list(read_documents([path])) == TEXTS
    assert list(read_documents([tmp_path])) == TEXTS


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_may_hold_one_object(tmp_path, indent):
    (tmp_path / "one.json").write_text(json.dumps(OBJECTS[0], indent=indent))
    assert list(read_documents([tmp_path / "one.json"])) == TEXTS[:1]


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
    assert re.search(r"skipped: .*a.jsonl: no column 'text' \(data.column\); it has 'title'", caplog.text)
    assert re.search(r"skipped: .*c.csv: no column 'text' \(data.column\); it has 'title'", caplog.text)


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
    assert "skipped" not in caplog.text
    with pytest.raises(ValueError, match=rf"a.jsonl{compression}: ends unexpectedly after line {len(read)} ") as error:
        list(read_documents([path]))
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
        "line 6 (column 'text' contains NUL bytes)"
    )
    assert expected in caplog.text


def test_a_quotation_mark_that_is_never_closed_is_named(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text('text\tid\none\t1\n"two\t2\nthree\t3\n')
    with pytest.raises(
        ValueError, match=r"a.tsv: ends unexpectedly after line 2 \(the quotation mark that opens in line 3"
    ):
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
    with pytest.raises(ValueError, match=f"^{name}: contains no text; give "):
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
