"""Documents from files and folders, and how sources are distinguished."""

import codecs
import gzip
import json
import logging
import os
from pathlib import Path

import pytest
from data_cases import COMPRESSIONS

from free_transformer.data import is_path_source, read_documents, read_documents_by_source, source_files
from free_transformer.data.letters import letters
from free_transformer.files import MARKER


def test_files_and_folders_are_read_by_name_each_file_a_document(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "c"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(f"text of {name}\n")
    (tmp_path / "single.txt").write_text("single")
    found = list(read_documents([tmp_path / "single.txt", str(tmp_path / "folder")]))
    assert found == ["single", *(f"text of {name}\n" for name in ("a/z.md", "b.txt", "c"))]


def test_the_source_of_a_document_is_its_folder_in_a_folder_of_folders(tmp_path):
    for name in ("plays/a.txt", "plays/acts/b.txt", "news/rows.jsonl", "loose.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text('{"text": "row 1"}\n{"text": "row 2"}\n' if "rows" in name else name)
    (tmp_path / "single.txt").write_text("single")
    sources = [tmp_path / "texts", tmp_path / "single.txt", "letters:1"]
    found = list(read_documents_by_source(sources))
    assert found[:-1] == [
        ("loose.txt", "texts"),
        ("row 1", "news"),
        ("row 2", "news"),
        ("plays/a.txt", "plays"),
        ("plays/acts/b.txt", "plays"),
        ("single", "single.txt"),
    ]
    assert found[-1].source == "letters:1"
    assert [document.text for document in found] == list(read_documents(sources))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"nul \x00 byte"])
def test_what_is_no_text_in_a_folder_is_left_out_with_a_warning(tmp_path, caplog, content):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image.png").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(read_documents([tmp_path])) == ["good"]
    assert "skipped" in caplog.text
    assert "image.png" in caplog.text


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n ")
    (tmp_path / "c.txt").write_text("c")
    assert list(read_documents([tmp_path])) == ["c"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_text_files_are_read_compressed_or_not(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"one\r\ntwo\rthree\n"))
    assert list(read_documents([path])) == ["one\ntwo\nthree\n"]


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


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.bz2", "a.csv.xz", "a.parquet.zst", "a.json.gz"])
def test_what_is_not_compressed_as_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text")
    with pytest.raises(ValueError, match=f"{name}: cannot be read") as error:
        list(read_documents([tmp_path / name]))
    assert "\n" not in str(error.value)


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
        ("nowhere.txt", None, "no such file or folder; check the path$"),
        ("nowhere.JSONL", None, "no such file or folder; check the path$"),
        ("nowhere/", None, "no such file or folder"),
        ("./nowhere", None, "no such file or folder"),
        ("nobody-has-this-name", None, "no such file, folder or data set"),
        ("empty.txt", b"", "contains no text; give a file, folder or data set"),
        ("blank.txt", b" \n\n", "contains no text"),
        ("binary.txt", b"\x80\x81", r"not UTF-8 text \(byte 0\); save it as UTF-8 text$"),
        ("nul.txt", b"a\x00b", "not text"),
        ("letters:0", None, "contains no text"),
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
    """`Path("")` is the current folder, which was not named."""
    assert not is_path_source("")
    assert source_files([""]) == []
    with pytest.raises(ValueError, match="a source is empty"):
        list(read_documents([""]))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="contains no text"):
        list(read_documents([tmp_path]))


def test_folders_that_we_write_are_no_text(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "README.md").write_text("a card")
    (tmp_path / "run" / MARKER).write_text("{}")
    assert list(read_documents([tmp_path])) == ["mine"]
    assert source_files([tmp_path]) == [tmp_path / "mine.txt"]
