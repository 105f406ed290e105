"""Documents from data sets of the hub and of `save_to_disk`."""

import re
from pathlib import Path

import datasets
import pytest
from data_cases import Hub, rows_from

from free_transformer.data import read_documents


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
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: not a data set; use name, name:configuration"):
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
    with pytest.raises(ValueError, match=r"^broken: ends unexpectedly after row 2 \(the hub\)$"):
        list(read_documents(["broken"]))


@pytest.mark.parametrize("name", ["~/nowhere", "two/folders/deep", "long text. " * 500, "nul\0"])
def test_a_path_that_is_missing_is_never_taken_for_a_data_set(hub, name):
    with pytest.raises(ValueError, match=r"no such file or folder|cannot be read \(.*(too long|null)"):
        list(read_documents([name]))
    assert not hub.asked


def test_a_data_set_whose_name_looks_like_a_file_can_be_named(hub):
    with pytest.raises(
        ValueError, match=r"owner/corpus.v2: no such file or folder; for a data set .*, use hub:owner/corpus.v2"
    ):
        list(read_documents(["owner/corpus.v2"]))


def test_saved_data_sets_are_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": ["one", "two"], "test": ["three"]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    assert list(read_documents([tmp_path / "saved"])) == ["one", "two"]
    assert list(read_documents([str(tmp_path / "saved" / "test")])) == ["three"]
    with pytest.raises(ValueError, match=r"no split 'validation'; name the folder of one: train, test"):
        list(read_documents([tmp_path / "saved"], split="validation"))
