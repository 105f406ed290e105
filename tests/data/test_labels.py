"""Documents by source, for reports."""

import json

import pytest

from free_transformer.data import read_labeled
from free_transformer.files import write_text


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("column", ["source", "label"])
def test_a_column_names_the_source_of_each_document(tmp_path, suffix, column):
    rows = [("one", "x"), ("two", "y"), ("three", "x"), ("", "y")]
    file = tmp_path / f"text.{suffix}"
    if suffix == "jsonl":
        write_text(file, "".join(json.dumps({"text": text, column: label}) + "\n" for text, label in rows))
    else:
        mark = "," if suffix == "csv" else "\t"
        write_text(file, f"{column}{mark}text\n" + "".join(f"{label}{mark}{text}\n" for text, label in rows))
    assert read_labeled([str(file)]) == {"x": ["one", "three"], "y": ["two"]}


def test_several_files_are_sources_and_one_is_none(tmp_path):
    for name in "ab":
        write_text(tmp_path / f"{name}.txt", f"text {name}")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert read_labeled(files) == {"a.txt": ["text a"], "b.txt": ["text b"]}
    assert read_labeled(files[:1]) == read_labeled(["letters:3:0"]) == {}


def test_a_column_that_is_no_source_is_left_out(tmp_path):
    """One label, or a different one for each document, carries no information about sources."""
    for name, labels in {"same": ["x"] * 20, "ids": list(range(20))}.items():
        lines = [json.dumps({"text": "words", "label": label}) for label in labels]
        write_text(tmp_path / f"{name}.jsonl", "\n".join(lines))
        assert read_labeled([str(tmp_path / f"{name}.jsonl")]) == {}
