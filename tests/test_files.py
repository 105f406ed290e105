import os
from pathlib import Path

import pytest

from free_transformer import files
from free_transformer.files import new_folder, write_text


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
