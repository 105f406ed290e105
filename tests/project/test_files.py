import os
from pathlib import Path

import pytest

from free_transformer import files
from free_transformer.errors import SettingsError
from free_transformer.files import MARKER, WRITTEN_BY, check_own_file, new_folder, own_folder, write_json, write_text


def everything_below(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "folder" for p in folder.rglob("*")}


def fail(*_, **__):
    raise OSError("No space left on device")


def test_text_is_written_into_folders_that_are_made_for_it(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "é 🙂\n")
    assert everything_below(tmp_path) == {"a": "folder", "a/b": "folder", "a/b/file.txt": "é 🙂\n"}
    assert (tmp_path / "a" / "b" / "file.txt").read_bytes() == "é 🙂\n".encode()


def test_text_replaces_what_was_there(tmp_path):
    for text in ("a long first text", "short"):
        write_text(tmp_path / "file.txt", text)
    assert everything_below(tmp_path) == {"file.txt": "short"}


@pytest.mark.parametrize("broken", ["fsync", "replace", "text"])
@pytest.mark.parametrize("before", [{}, {"file.txt": "old"}])
def test_text_that_cannot_be_written_leaves_the_old_and_nothing_else(tmp_path, monkeypatch, before, broken):
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    text = "new \ud800" if broken == "text" else "new"  # a lone surrogate has no bytes in UTF-8
    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if broken == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_text(tmp_path / "file.txt", text)
    assert everything_below(tmp_path) == before


def test_text_can_be_read_by_others(tmp_path):
    write_text(tmp_path / "file.txt", "text")
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o644


def test_a_folder_can_be_read_by_others(tmp_path):
    with new_folder(tmp_path / "new") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").touch(0o600)
    assert (tmp_path / "new" / "inner" / "weights").stat().st_mode & 0o777 == 0o644


def test_a_folder_is_there_only_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "a" / "new") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file.txt").write_text("text")
        assert not (tmp_path / "a" / "new").exists()
        assert folder.parent == tmp_path / "a"  # a rename within one file system
    expected = {"a": "folder", "a/new": "folder", "a/new/inner": "folder", "a/new/inner/file.txt": "text"}
    assert everything_below(tmp_path) == expected
    assert (tmp_path / "a" / "new").stat().st_mode & 0o777 == 0o755


def test_a_folder_takes_the_place_of_an_older_one_whole(tmp_path):
    for name in ("old.txt", "new.txt"):
        with new_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
    assert everything_below(tmp_path) == {"folder": "folder", "folder/new.txt": "new.txt"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [{}, {"folder": "folder", "folder/old.txt": "old"}])
def test_a_folder_that_cannot_be_filled_leaves_the_old_one_and_nothing_else(tmp_path, before, error):
    if before:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "old.txt").write_text("old")

    def fill() -> None:
        with new_folder(tmp_path / "folder") as folder:
            (folder / "half.txt").write_text("half")
            raise error

    with pytest.raises(error):
        fill()
    assert everything_below(tmp_path) == before


def test_a_folder_that_cannot_be_synced_leaves_the_old_one(tmp_path, monkeypatch):
    with new_folder(tmp_path / "folder") as folder:
        (folder / "old.txt").write_text("old")
    monkeypatch.setattr(files, "_fsync", fail)
    with pytest.raises(OSError, match="No space left"), new_folder(tmp_path / "folder") as folder:
        (folder / "new.txt").write_text("new")
    assert everything_below(tmp_path) == {"folder": "folder", "folder/old.txt": "old"}


def test_a_folder_that_cannot_take_its_place_gives_it_back_to_the_old_one(tmp_path, monkeypatch):
    with new_folder(tmp_path / "folder") as folder:
        (folder / "old.txt").write_text("old")
    replace, calls = Path.replace, []

    def fail_at_second(self, target):
        calls.append(target)
        if len(calls) == 2:
            fail()
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail_at_second)
        with pytest.raises(OSError, match="No space left"), new_folder(tmp_path / "folder") as folder:
            (folder / "new.txt").write_text("new")
    assert everything_below(tmp_path) == {"folder": "folder", "folder/old.txt": "old"}


def fill(path: Path, **options) -> None:
    with own_folder(path, "export", **options) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text("new")


@pytest.mark.parametrize("before", [None, {}])
def test_a_new_or_empty_folder_may_be_filled_again_and_again(tmp_path, before):
    if before is not None:
        (tmp_path / "out").mkdir()
    for _ in range(2):
        fill(tmp_path / "out")
        assert set(everything_below(tmp_path / "out")) == {MARKER, "inner", "inner/weights"}


@pytest.mark.parametrize("mine", ["notes.txt", "inner/notes.txt"])
def test_a_folder_with_files_of_others_is_left_alone(tmp_path, mine):
    fill(tmp_path / "out")
    (tmp_path / "out" / mine).write_text("mine")
    before = everything_below(tmp_path)
    with pytest.raises(
        SettingsError, match=f"out: holds files that are not of an earlier export: {mine}; name another"
    ):
        fill(tmp_path / "out")
    assert everything_below(tmp_path) == before
    fill(tmp_path / "out", overwrite=True)
    assert mine not in everything_below(tmp_path / "out")


def test_other_kinds_files_and_damaged_markers_are_no_permission(tmp_path):
    fill(tmp_path / "out")
    with pytest.raises(SettingsError, match="not of an earlier tokenizer"), own_folder(tmp_path / "out", "tokenizer"):
        pass
    (tmp_path / "out" / MARKER).write_text("[]")
    with pytest.raises(SettingsError, match="not of an earlier export"):
        fill(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingsError, match="file: a file; name a folder"):
        fill(tmp_path / "file")


def test_what_is_being_read_is_not_replaced_even_so(tmp_path):
    fill(tmp_path / "run" / "model")
    for out in ("run", "run/model", "."):
        with pytest.raises(SettingsError, match=r"holds what is being read \(model\)"):
            fill(tmp_path / out, overwrite=True, protected=[tmp_path / "run" / "model"])
    fill(tmp_path / "run" / "onnx", protected=[tmp_path / "run" / "model"])


def test_files_that_come_while_a_folder_is_written_are_kept(tmp_path):
    with pytest.raises(SettingsError, match=r"notes\.txt"), own_folder(tmp_path / "out", "export") as folder:
        (folder / "weights").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert everything_below(tmp_path) == {"out": "folder", "out/notes.txt": "mine"}


def test_only_files_that_we_wrote_are_replaced(tmp_path):
    file = tmp_path / "results.json"
    check_own_file(file)
    file.write_text("{}")
    with pytest.raises(SettingsError, match=r"results\.json: exists, and was not written by this command"):
        check_own_file(file)
    check_own_file(file, overwrite=True)
    write_json(file, {"written_by": WRITTEN_BY})
    check_own_file(file)
    with pytest.raises(SettingsError):
        check_own_file(tmp_path)
