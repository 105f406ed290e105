"""Writing that a crash cannot leave half done: a temporary neighbour, fsync, rename."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"


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
