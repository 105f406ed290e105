"""
Writing that a crash cannot leave half done (a temporary neighbor, fsync, rename), and folders that belong to us.

A folder that we write has a marker, a JSON file that says so. Nothing is replaced or deleted without it.
"""

import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from free_transformer.errors import SettingsError

TEMPORARY = ".tmp-"
MARKER = ".free-transformer.json"  # in folders that we write: what they are, and which files in them are ours
LOCK = ".free-transformer.lock"  # held by the process that works in a folder
WRITTEN_BY = "free-transformer"  # in files that we wrote
MAX_NAMED = 3
LOCK_PATIENCE = 0.5  # seconds: `is_in_use` holds the lock for a moment


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


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Replaces the file's contents at once; what JSON cannot hold, such as the standard error of one text, is null."""
    write_text(path, json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n")


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, since some messages fill a page."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def not_a_folder(path: Path) -> str | None:
    """What is wrong with a folder to read, for a message. None for a folder."""
    if path.is_dir():
        return None
    return "a file, not a folder" if path.exists() else "no such folder"


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
        write_json(folder / MARKER, {"written_by": WRITTEN_BY, "kind": kind, "files": files_in(folder)})
        check_replaceable(path, kind, overwrite, protected)  # again: writing may have taken long


def check_replaceable(path: Path, kind: str, overwrite: bool = False, protected: Iterable[Path] = ()) -> None:
    """What `own_folder` checks, for commands that have long work to do before they write."""
    here = path.resolve()
    for each in map(Path.resolve, protected):
        if each == here or here in each.parents:
            raise SettingsError(f"{path}: holds what is being read ({each.name}); name another folder")
    check_writable(path.absolute().parent)
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
    marker = read_marker(path)
    return set(marker.get("files", ())) if marker.get("kind") == kind else set()


def read_marker(folder: Path) -> dict[str, Any]:
    """Content of a folder's marker; empty if the folder has none of ours."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker if marker["written_by"] == WRITTEN_BY else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def update_marker(folder: Path, **values: object) -> None:
    """Sets values in the marker of a folder, which `claimed_folder` has made ours."""
    write_json(folder / MARKER, {**read_marker(folder), "written_by": WRITTEN_BY, **values})


@contextmanager
def claimed_folder(path: Path, kind: str, names: Iterable[str]) -> Iterator[None]:
    """
    Holds a folder for one process that fills it over time, such as a run: no other process can claim it meanwhile.

    The lock is the kernel's (`flock`, also over NFS), so it ends with its process however that ends. Where none of
    `names` is there at the end, marker, lock and folders that were created here are removed again.

    Args:
        kind: what the folder holds, as in `"run"`.
        names: files and folders that are going to be written in it. Without our marker none of them may be there.

    Raises:
        SettingsError: where the folder is used by another process, or holds something of these names that is not ours.
    """
    names = list(names)
    check_claimable(path, kind, names)
    with ExitStack() as cleanup:
        try:
            for folder in reversed([each for each in (path, *path.parents) if not each.exists()]):
                folder.mkdir(exist_ok=True)
                cleanup.callback(_remove_empty, folder)
            cleanup.callback(_remove_unused_lock, path)
            cleanup.enter_context(_locked(path))
        except OSError as error:
            raise SettingsError(f"{path}: cannot be written to ({error.strerror}); choose another folder") from error
        check_claimable(path, kind, names)  # again: another process may have ended in between
        before = read_marker(path)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(timezone.utc).isoformat()}
        update_marker(path, kind=kind, owner=owner)
        try:
            yield
        finally:
            with suppress(OSError):  # a full disk, say, which is not to hide the error that it has caused
                update_marker(path, owner=None)
                if not before and not any(os.path.lexists(path / name) for name in names):
                    (path / MARKER).unlink()


def check_claimable(path: Path, kind: str, names: Iterable[str]) -> None:
    """`SettingsError` where a folder holds files of these names that are not of this kind and ours."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise SettingsError(f"{path}: a file; name a folder")
    marker = read_marker(path)
    if marker.get("kind") == kind:
        return
    found = sorted(name for name in names if os.path.lexists(path / name))
    if marker or found:
        what = f"the folder of a {marker.get('kind')}" if marker else f"holds {few(found)}, not written by a {kind}"
        raise SettingsError(f"{path}: {what}, which would be replaced; choose another folder")


def is_in_use(path: Path) -> bool:
    """Whether a process has claimed the folder and is still alive."""
    if not (path / LOCK).exists():
        return False
    try:
        with _locked(path):
            return False
    except SettingsError:
        return True
    except OSError:  # a folder that can only be read is not trained in
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout:
        owner = read_marker(folder).get("owner") or {}
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        raise SettingsError(
            f"{folder}: {who} is working in this folder; wait until it ends, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _remove_unused_lock(folder: Path) -> None:
    """Removes the lock of a folder that is not ours after all."""
    with suppress(OSError):
        if not (folder / MARKER).exists() and not is_in_use(folder):
            (folder / LOCK).unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def check_writable(folder: Path) -> None:
    """
    `SettingsError` where no file can be written in a folder, or none on its disk: for commands that compute for long.

    Folders that are missing are not created.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=existing) as file:
            file.write(b"-" * 4096)
            file.flush()
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be written to ({error.strerror}); choose another place") from error


def check_own_file(path: Path, overwrite: bool = False) -> None:
    """`SettingsError` where a file is there that we did not write, or where none can be written."""
    check_writable(path.parent)
    if path.is_dir():
        raise SettingsError(f"{path}: a folder; name a file, as in {path / 'results'}{path.suffix or '.json'}")
    if overwrite or not os.path.lexists(path):
        return
    if not path.is_file() or WRITTEN_BY.encode() not in path.read_bytes():
        raise SettingsError(
            f"{path}: exists, and was not written by this command; name another file, or use --overwrite"
        )


def check_own_results(path: Path, *keys: str) -> None:
    """`SettingsError` where a file without the keys of the results to be written is there, or none can be written."""
    check_writable(path.parent)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or not values.keys() >= set(keys):
        raise SettingsError(f"{path}: not a results file of this command, and would be replaced; move it away")


@contextmanager
def new_folder(path: Path, ours: Iterable[str] | None = None) -> Iterator[Path]:
    """
    A folder to fill, that takes its place (an older one's, if need be) only when all is written.

    Args:
        ours: files of the older folder that may be replaced; all others are kept. Default: all may be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    try:
        yield temporary
        if ours is not None and path.is_dir():
            _keep_others(path, temporary, set(ours))
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _keep_others(old: Path, new: Path, ours: set[str]) -> None:
    """Copies the files of a folder that are not ours into the one that replaces it."""
    for file in sorted(old.rglob("*")):
        name = file.relative_to(old)
        if file.is_file() and str(name) not in ours:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, new / name)


def files_in(folder: Path) -> list[str]:
    """The names of all files in a folder, relative to it."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def publish_folder(temporary: Path, path: Path) -> None:
    """Gives a folder that is filled, in the same parent folder, the name `path`, an older one's if need be."""
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            file.chmod(0o644)  # safetensors denies access to others, but a server of another user must read it
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
