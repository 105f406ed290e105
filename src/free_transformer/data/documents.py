"""Reads documents from files, folders, tables and data sets, one at a time."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from free_transformer.data.letters import letters
from free_transformer.data.tables import READERS, is_table, read_data_set, read_table, warn_once
from free_transformer.data.text_files import DECOMPRESSORS, TRAIN_EXTRA, UnreadableFile, read_text_file, reason
from free_transformer.errors import InputError
from free_transformer.files import MARKER, first_line

HUB = "hub:"
FILE_SUFFIXES = {".txt", ".md", *READERS, *DECOMPRESSORS}  # names of data sets do not have these suffixes
LETTERS = re.compile(r"letters:(\d+)(?::(\d+))?")
DATA_SET = re.compile(r"(?P<name>[^\[\]:]*)(?::(?P<configuration>[^\[\]/\\]*))?(?:\[(?P<split>.*)\])?")
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)  # name or owner/name on the hub


class Document(NamedTuple):
    """A document and the name of its source."""

    text: str
    source: str


def read_documents(
    sources: Sequence[str | Path], column: str = "text", split: str = "train", max_bad_rows: int = 100
) -> Iterator[str]:
    """
    Yields the documents of each source in a fixed order. At most one file's text is in memory at a time.

    Args:
        sources: any of
            - a text file (one document) in UTF-8, or in UTF-16 or UTF-32 with a byte order mark;
            - a table (one document per row): `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet`;
            - either of these compressed: `.gz`, `.bz2`, `.xz` or `.zst`;
            - a folder written by `save_to_disk` of `datasets`;
            - any other folder: all files below it, sorted by name, except hidden files, runs and exports;
            - a data set for `datasets.load_dataset`: `name`, `name:configuration`, `name[split]` or
              `name:configuration[split]`. Add the prefix `hub:` if a file has the same name;
            - `letters:COUNT` or `letters:COUNT:SEED`, the paper's synthetic task.
        column: name of the text column in tables and data sets.
        split: split of data sets that do not name one.
        max_bad_rows: maximum number of rows per table that are skipped with a warning because they have no text.

    Raises:
        InputError: if a source is missing, empty or not text, or if a table has too many bad rows. In a folder, files
            that are not text are skipped with a warning.
    """
    for document in read_documents_by_source(sources, column, split, max_bad_rows):
        yield document.text


def read_documents_by_source(
    sources: Sequence[str | Path], column: str = "text", split: str = "train", max_bad_rows: int = 100
) -> Iterator[Document]:
    """
    Yields the documents of `read_documents` with the name of their source.

    In a folder of folders, the source is the first subfolder, otherwise the name of the file, folder or data set.
    """
    if not sources:
        raise InputError("no data: give at least one file, folder or data set")
    for source in sources:
        if not str(source):
            raise InputError("a source is empty: give a file, folder or data set")
        found = False
        for document in _read_source(source, column, split, max_bad_rows):
            if document.text and not document.text.isspace():
                found = True
                yield document
        if not found:
            raise InputError(f"{source}: contains no text; give a file, folder or data set with text")


def is_path_source(source: str | Path) -> bool:
    """Whether a source names a file or folder, which need not exist. Data sets and `letters:COUNT` do not."""
    if isinstance(source, Path):
        return True
    if not source or source.startswith(HUB) or LETTERS.fullmatch(source):
        return False
    if _exists(Path(source)):
        return True
    if source.startswith("letters:"):  # the count is not a number
        return False
    parts = DATA_SET.fullmatch(source)
    if parts is None or not REPOSITORY.fullmatch(parts["name"]):
        return True
    names_data_set = parts["configuration"] is not None or parts["split"] is not None
    return bool(Path(source).suffix) and not names_data_set  # configuration names often contain dots


def source_files(sources: Sequence[str | Path]) -> list[Path]:
    """Lists the files that these sources read, in reading order. Missing paths and data sets have none."""
    found: list[Path] = []
    for path in (Path(source) for source in sources if is_path_source(source)):
        if _exists(path):
            found += _files_below(path) if path.is_dir() else [path]
    return found


def _read_source(source: str | Path, column: str, split: str, max_bad_rows: int) -> Iterator[Document]:
    name = str(source)
    if is_path_source(source):
        yield from _read_path(Path(source), name, column, split, max_bad_rows)
    elif synthetic := LETTERS.fullmatch(name):
        yield from _of(name, letters(int(synthetic[1]), seed=int(synthetic[2] or 0)))
    elif name.startswith("letters:"):
        raise InputError(
            f"{name}: the synthetic task is letters:COUNT or letters:COUNT:SEED, with non-negative integers"
        )
    else:
        table = _load_data_set(_DataSet.parse(name, split))
        yield from _of(name, read_data_set(table, name, column, max_bad_rows))


def _of(source: str, texts: Iterable[str]) -> Iterator[Document]:
    return (Document(text, source) for text in texts)


def _read_path(path: Path, name: str, column: str, split: str, max_bad_rows: int) -> Iterator[Document]:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        names_hub = REPOSITORY.fullmatch(name) and path.suffix.lower() not in FILE_SUFFIXES
        hint = f"; for a data set of that name, use {HUB}{name}" if names_hub else "; check the path"
        raise InputError(f"{name}: no such file or folder{hint}") from error
    except (OSError, ValueError) as error:  # the name is too long or contains NUL, or a folder is not accessible
        raise InputError(f"{name}: cannot be read ({reason(error)})") from error
    if path.is_file():
        yield from _of(path.name, _read_file(path, column, max_bad_rows))
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        table = _load_from_disk(path, split)
        yield from _of(path.resolve().name, read_data_set(table, name, column, max_bad_rows))
    elif path.is_dir():
        yield from _read_folder(path, column, max_bad_rows)
    else:
        raise InputError(f"{name}: neither a file nor a folder; copy its text to a file first")


def _read_folder(folder: Path, column: str, max_bad_rows: int) -> Iterator[Document]:
    for path in _files_below(folder):
        parents = path.relative_to(folder).parts[:-1]
        source = parents[0] if parents else folder.resolve().name
        read = 0
        try:
            for text in _read_file(path, column, max_bad_rows):
                read += 1
                yield Document(text, source)
        except UnreadableFile as error:  # one bad file must not stop a run on many files
            message = f"{error}; only the first {read} rows were read" if read else f"skipped: {error}"
            warn_once(str(path.absolute()), message)


def _read_file(path: Path, column: str, max_bad_rows: int) -> Iterator[str]:
    if is_table(path):
        yield from read_table(path, column, max_bad_rows)
    else:
        yield read_text_file(path)


def _files_below(folder: Path) -> list[Path]:
    """Lists all files except hidden ones and those in runs, exports and other folders that this package creates."""
    created = {marker.parent for marker in folder.rglob(MARKER)} - {folder}
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and created.isdisjoint(path.parents)
    ]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # `_read_path` reports the reason
        return False


@dataclass(frozen=True)
class _DataSet:
    source: str  # as given by the caller
    names: tuple[str, ...]  # the name, and the configuration if one is given
    split: str

    @classmethod
    def parse(cls, source: str, default_split: str) -> "_DataSet":
        parts = DATA_SET.fullmatch(source.removeprefix(HUB))
        if parts is None or not parts["name"] or parts["configuration"] == "" or parts["split"] == "":
            raise InputError(f"{source}: not a data set; use name, name:configuration, or either with [split]")
        names = tuple(part for part in (parts["name"], parts["configuration"]) if part)
        if source.startswith(HUB) and Path(names[0]).is_dir():
            names = (f"hf://datasets/{names[0]}", *names[1:])  # or `datasets` reads the folder
        return cls(source, names, parts["split"] or default_split)


def _load_from_disk(folder: Path, split: str) -> Iterable[object]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{folder}: reading a saved data set needs the extra: {TRAIN_EXTRA}") from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # as in `_load_data_set`
        raise InputError(f"{folder}: cannot be read as a saved data set ({first_line(error)})") from error
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise InputError(f"{folder}: no split {split!r}; name the folder of one: {', '.join(map(str, saved))}")
    return saved[split]


def _load_data_set(data_set: _DataSet) -> Iterable[object]:
    source, split = data_set.source, data_set.split
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source}: no such file or folder, and data sets need the extra: {TRAIN_EXTRA}") from error
    try:  # streaming downloads only what is read, and caches nothing
        return datasets.load_dataset(*data_set.names, streaming=True, split=split)
    except Exception as error:  # `datasets` raises a different class for each format and each kind of failure
        message = first_line(error)
        if "split" in message.lower() and split in message:
            name = source.removesuffix(f"[{split}]")
            raise InputError(
                f"{source}: no split {split!r}; choose one that exists, as in {name}[test] ({message})"
            ) from error
        raise InputError(
            f"{source}: no such file, folder or data set ({message}); check the path, or the name on the Hub"
        ) from error
