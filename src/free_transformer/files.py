"""Writing that a crash cannot leave half done: a temporary neighbour, fsync, rename."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from free_transformer.errors import SettingsError

TEMPORARY = ".tmp-"
MARKER = ".free-transformer.json"  # in folders that we wrote, with the names of the files in them
WRITTEN_BY = "free-transformer"  # in files that we wrote
MAX_NAMED = 3


def write_text(path: Path, text: str) -> None:
    """Replaces the file's contents at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replaces the file's contents at once; what JSON cannot hold, such as the standard error of one text, is null."""
    write_text(path, json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages that go on for a page."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def few(names: list[str]) -> str:
    """The first of some names, for a message."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


@contextmanager
def own_folder(path: Path, kind: str, overwrite: bool = False, protected: Iterable[Path] = ()) -> Iterator[Path]:
    """
    `new_folder` for a name that a person has chosen: it replaces only what the same command has written there.

    Args:
        kind: what is written, as in `"export"`.
        overwrite: replaces whatever is there.
        protected: files and folders that are not replaced even so, such as the model that is exported.

    Raises:
        SettingsError: where `path` holds anything else.
    """
    protected = list(protected)
    if path.is_symlink():  # the folder that it points to is meant
        path = path.resolve()
    check_replaceable(path, kind, overwrite, protected)
    with new_folder(path) as folder:
        yield folder
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        write_json(folder / MARKER, {"written_by": WRITTEN_BY, "kind": kind, "files": names})
        check_replaceable(path, kind, overwrite, protected)  # again: writing may have taken long


def check_replaceable(path: Path, kind: str, overwrite: bool = False, protected: Iterable[Path] = ()) -> None:
    """What `own_folder` checks, for commands that have long work to do before they write."""
    here = path.resolve()
    for each in map(Path.resolve, protected):
        if each == here or here in each.parents:
            raise SettingsError(f"{path}: holds what is being read ({each.name}); name another folder")
    if overwrite or not os.path.lexists(path):
        return
    if not path.is_dir():
        raise SettingsError(f"{path}: a file; name a folder, or use --overwrite to replace it")
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()} - {MARKER}
    others = sorted(found - _listed(path, kind))
    if others:
        raise SettingsError(
            f"{path}: holds files that are not of an earlier {kind}: {few(others)}; name "
            "another folder, or use --overwrite to replace all of it"
        )


def _listed(path: Path, kind: str) -> set[str]:
    """The files in a folder that we wrote, by its marker."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        return set(marker["files"]) if marker["kind"] == kind and marker["written_by"] == WRITTEN_BY else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def check_own_file(path: Path, overwrite: bool = False) -> None:
    """`SettingsError` where a file is there that we did not write."""
    if overwrite or not os.path.lexists(path):
        return
    if not path.is_file() or WRITTEN_BY.encode() not in path.read_bytes():
        raise SettingsError(
            f"{path}: exists, and was not written by this command; name another file, or use --overwrite"
        )


def check_own_results(path: Path, *keys: str) -> None:
    """`SettingsError` where a file is there that has not the keys of the results to be written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or not values.keys() >= set(keys):
        raise SettingsError(f"{path}: not a results file of this command, and would be replaced; move it away")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, that takes its place (an older one's, if need be) only when all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, path: Path) -> None:
    """Gives a folder that is filled, in the same parent folder, the name `path`, an older one's if need be."""
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            file.chmod(0o644)  # safetensors lets nobody else read, as a server of another user has to
            _fsync(file)
    temporary.chmod(0o755)
    old = None
    if path.exists():
        old = path.with_name(f"{TEMPORARY}old-{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
    try:
        temporary.replace(path)
    except BaseException:
        if old is not None:
            old.replace(path)
        raise
    _fsync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
