"""
Atomic writes (temporary file, fsync, rename), and folders that this library owns.

A folder written by this library has a marker, a JSON file. Without it, nothing is replaced or deleted.
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
MARKER = ".free-transformer.json"  # marker with the kind of a folder and the files that we wrote
LOCK = ".free-transformer.lock"  # held by the process that works in a folder
WRITTEN_BY = "free-transformer"  # marks files that we wrote
MAX_NAMED = 3
LOCK_PATIENCE = 0.5  # seconds, since `is_in_use` holds the lock briefly


def write_text(path: Path, text: str) -> None:
    """Replaces the file's contents atomically."""
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
    """Replaces the file's contents atomically. NaN, such as the standard error of a single text, becomes null."""
    write_text(path, json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n")


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, since some messages fill a page."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def not_a_folder(path: Path) -> str | None:
    """Returns the reason why a path is not a folder, for a message; None for a folder."""
    if path.is_dir():
        return None
    return "a file, not a folder" if path.exists() else "no such folder"


def few(names: list[str]) -> str:
    """Joins the first few names for a message."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


@contextmanager
def own_folder(path: Path, kind: str, overwrite: bool = False, protected: Iterable[Path] = ()) -> Iterator[Path]:
    """
    Same as `new_folder`, for a path chosen by the user. It replaces only folders written by the same command.

    Args:
        kind: kind of the folder, such as `"export"`.
        overwrite: replace existing files of any kind.
        protected: files and folders that are never replaced, such as the model that is exported.

    Raises:
        SettingsError: if `path` contains anything else.
    """
    protected = list(protected)
    if path.is_symlink():  # use the folder that it points to
        path = path.resolve()
    check_replaceable(path, kind, overwrite, protected)
    with new_folder(path) as folder:
        yield folder
        write_json(folder / MARKER, {"written_by": WRITTEN_BY, "kind": kind, "files": files_in(folder)})
        check_replaceable(path, kind, overwrite, protected)  # again, since writing may have taken long


def check_replaceable(path: Path, kind: str, overwrite: bool = False, protected: Iterable[Path] = ()) -> None:
    """Performs the checks of `own_folder`, for commands that compute for a long time before they write."""
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
    """Returns the files in a folder that we wrote, according to its marker."""
    marker = read_marker(path)
    return set(marker.get("files", ())) if marker.get("kind") == kind else set()


def read_marker(folder: Path) -> dict[str, Any]:
    """Returns the contents of a folder's marker; empty if it has none."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker if marker["written_by"] == WRITTEN_BY else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def update_marker(folder: Path, **values: object) -> None:
    """Sets values in the marker of a folder that was claimed with `claimed_folder`."""
    write_json(folder / MARKER, {**read_marker(folder), "written_by": WRITTEN_BY, **values})


@contextmanager
def claimed_folder(path: Path, kind: str, names: Iterable[str]) -> Iterator[None]:
    """
    Claims a folder for a process that fills it over time, such as a run. Other processes cannot claim it meanwhile.

    The kernel holds the lock (`flock`, also over NFS), so it ends with the process. If none of `names` exists at the
    end, the marker, the lock and newly created folders are removed again.

    Args:
        kind: kind of the folder, such as `"run"`.
        names: files and folders that will be written in it. Without our marker, none of them may exist.

    Raises:
        SettingsError: if another process uses the folder, or it contains files with these names that are not ours.
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
        check_claimable(path, kind, names)  # again, since another process may have just ended
        before = read_marker(path)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(timezone.utc).isoformat()}
        update_marker(path, kind=kind, owner=owner)
        try:
            yield
        finally:
            with suppress(OSError):  # for example a full disk, which must not hide the original error
                update_marker(path, owner=None)
                if not before and not any(os.path.lexists(path / name) for name in names):
                    (path / MARKER).unlink()


def check_claimable(path: Path, kind: str, names: Iterable[str]) -> None:
    """Raises `SettingsError` if a folder contains files with these names that were not written by this kind."""
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
    except OSError:  # a read-only folder is not in use
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
    """Removes the lock of a folder that turned out not to be ours."""
    with suppress(OSError):
        if not (folder / MARKER).exists() and not is_in_use(folder):
            (folder / LOCK).unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def check_writable(folder: Path) -> None:
    """
    Raises `SettingsError` if a folder is not writable, for commands that compute for a long time before they write.

    It does not create missing folders.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=existing) as file:
            file.write(b"-" * 4096)
            file.flush()
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be written to ({error.strerror}); choose another place") from error


def check_own_file(path: Path, overwrite: bool = False) -> None:
    """Raises `SettingsError` if a file exists that we did not write, or if the file cannot be written."""
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
    """Raises `SettingsError` if an existing file lacks the keys of our results, or if the file cannot be written."""
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
    Yields a temporary folder that replaces `path` only when all files are written.

    Args:
        ours: files of the old folder that may be replaced; all others are kept. Default: all files.
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
    """Copies the files of a folder that are not ours into the folder that replaces it."""
    for file in sorted(old.rglob("*")):
        name = file.relative_to(old)
        if file.is_file() and str(name) not in ours:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, new / name)


def files_in(folder: Path) -> list[str]:
    """Returns the names of all files in a folder, relative to it."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def publish_folder(temporary: Path, path: Path) -> None:
    """Renames a complete folder to `path`, in the same parent folder, replacing an older folder."""
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
