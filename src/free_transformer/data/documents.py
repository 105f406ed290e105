"""Documents from files, folders, tables and data sets, one text at a time."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from free_transformer.data.letters import letters
from free_transformer.data.tables import READERS, is_table, read_data_set, read_table, warn_once
from free_transformer.data.text_files import DECOMPRESSORS, TRAIN_EXTRA, UnreadableFile, read_text_file, reason
from free_transformer.files import MARKER, first_line

HUB = "hub:"
FILE_SUFFIXES = {".txt", ".md", *READERS, *DECOMPRESSORS}  # no end of a data set's name
LETTERS = re.compile(r"letters:(\d+)(?::(\d+))?")
NAME = re.compile(r"(?P<name>[^\[\]:]*)(?::(?P<configuration>[^\[\]/\\]*))?(?:\[(?P<split>.*)\])?")
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)  # name or owner/name


def read_documents(
    sources: Sequence[str | Path], column: str = "text", split: str = "train", max_bad_rows: int = 100
) -> Iterator[str]:
    """
    Yields the documents of each source in a fixed order, without holding more than one file's text.

    Args:
        sources: any of
            - a text file (one document) in UTF-8, or in UTF-16 or UTF-32 with a byte order mark;
            - a table (one document per row): `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv` or `.parquet`;
            - either of them compressed: `.gz`, `.bz2`, `.xz` or `.zst`;
            - a folder that `datasets` has saved with `save_to_disk`;
            - any other folder (all files below it, by name, without hidden ones and without runs and exports);
            - a data set that `datasets.load_dataset` knows: `name`, `name:configuration`, `name[split]` or
              `name:configuration[split]`, or `hub:` and any of these where a file has the same name;
            - `letters:COUNT:SEED`, the paper's synthetic task.
        column: column of the text in tables and data sets.
        split: split of data sets that name none.
        max_bad_rows: number of rows without text in the column that are skipped with a warning, in each table.

    Raises:
        ValueError: if a source is missing, empty or not text, or if a table has too many bad rows. In a folder, files
            that are not text are left out with a warning.
    """
    if not sources:
        raise ValueError("no data: name at least one file, folder or data set")
    for source in sources:
        if not str(source):
            raise ValueError("a source has no name: name a file, folder or data set")
        found = False
        for document in _read_source(source, column, split, max_bad_rows):
            if document and not document.isspace():
                found = True
                yield document
        if not found:
            raise ValueError(f"{source}: there is no text in it")


def is_path_source(source: str | Path) -> bool:
    """Whether a source names a file or folder, existing or not, and not a data set or `letters:COUNT:SEED`."""
    if isinstance(source, Path):
        return True
    if not source or source.startswith(HUB) or LETTERS.fullmatch(source):
        return False
    if _exists(Path(source)):
        return True
    if source.startswith("letters:"):  # with a count that is no number
        return False
    parts = NAME.fullmatch(source)
    if parts is None or not REPOSITORY.fullmatch(parts["name"]):
        return True
    names_data_set = parts["configuration"] is not None or parts["split"] is not None
    return bool(Path(source).suffix) and not names_data_set  # names of configurations often have dots


def source_files(sources: Sequence[str | Path]) -> list[Path]:
    """The files that these sources would read, in that order. Missing paths and other sources have none."""
    found: list[Path] = []
    for path in (Path(source) for source in sources if is_path_source(source)):
        if _exists(path):
            found += _files_below(path) if path.is_dir() else [path]
    return found


def _read_source(source: str | Path, column: str, split: str, max_bad_rows: int) -> Iterator[str]:
    name = str(source)
    if is_path_source(source):
        yield from _read_path(Path(source), name, column, split, max_bad_rows)
    elif synthetic := LETTERS.fullmatch(name):
        yield from letters(int(synthetic[1]), seed=int(synthetic[2] or 0))
    elif name.startswith("letters:"):
        raise ValueError(f"{name}: the synthetic task is letters:COUNT or letters:COUNT:SEED, with whole numbers")
    else:
        table = _load_data_set(_DataSet.parse(name, split))
        yield from read_data_set(table, name, column, max_bad_rows)


def _read_path(path: Path, name: str, column: str, split: str, max_bad_rows: int) -> Iterator[str]:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        of_hub = REPOSITORY.fullmatch(name) and path.suffix.lower() not in FILE_SUFFIXES
        hint = f"; a data set of that name is {HUB}{name}" if of_hub else ""
        raise ValueError(f"{name}: no such file or folder{hint}") from error
    except (OSError, ValueError) as error:  # a name that is too long or has a NUL, a folder that is locked
        raise ValueError(f"{name}: cannot be read ({reason(error)})") from error
    if path.is_file():
        yield from _read_file(path, column, max_bad_rows)
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from read_data_set(_load_from_disk(path, split), name, column, max_bad_rows)
    elif path.is_dir():
        yield from _read_folder(path, column, max_bad_rows)
    else:
        raise ValueError(f"{name}: neither a file nor a folder; write its text to a file first")


def _read_folder(folder: Path, column: str, max_bad_rows: int) -> Iterator[str]:
    for path in _files_below(folder):
        read = 0
        try:
            for text in _read_file(path, column, max_bad_rows):
                read += 1
                yield text
        except UnreadableFile as error:  # one bad file among many is no reason to stop
            message = f"{error}; only the first {read} rows were read" if read else f"left out: {error}"
            warn_once(str(path.absolute()), message)


def _read_file(path: Path, column: str, max_bad_rows: int) -> Iterator[str]:
    if is_table(path):
        yield from read_table(path, column, max_bad_rows)
    else:
        yield read_text_file(path)


def _files_below(folder: Path) -> list[Path]:
    """Without hidden ones, and without runs, exports and other folders that we write: they are no training text."""
    ours = {marker.parent for marker in folder.rglob(MARKER)} - {folder}
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and ours.isdisjoint(path.parents)
    ]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # `_read_path` says why
        return False


@dataclass(frozen=True)
class _DataSet:
    source: str  # as given
    names: tuple[str, ...]  # the name, and the configuration where one is named
    split: str

    @classmethod
    def parse(cls, source: str, default_split: str) -> "_DataSet":
        parts = NAME.fullmatch(source.removeprefix(HUB))
        if parts is None or not parts["name"] or parts["configuration"] == "" or parts["split"] == "":
            raise ValueError(f"{source}: not a data set; write name, name:configuration, or either with [split]")
        names = tuple(part for part in (parts["name"], parts["configuration"]) if part)
        if source.startswith(HUB) and Path(names[0]).is_dir():
            names = (f"hf://datasets/{names[0]}", *names[1:])  # or `datasets` would read the folder
        return cls(source, names, parts["split"] or default_split)


def _load_from_disk(folder: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{folder}: a saved data set needs the extra: {TRAIN_EXTRA}") from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # as in `_load_data_set`
        raise ValueError(f"{folder}: cannot be read as a saved data set ({first_line(error)})") from error
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise ValueError(f"{folder}: no split {split!r}; name the folder of one: {', '.join(map(str, saved))}")
    return saved[split]


def _load_data_set(data_set: _DataSet) -> Any:
    source, split = data_set.source, data_set.split
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: no such file or folder, and data sets need the extra: {TRAIN_EXTRA}") from error
    try:  # streaming reads what is asked for and leaves no copy in a cache
        return datasets.load_dataset(*data_set.names, streaming=True, split=split)
    except Exception as error:  # `datasets` raises a different class for each format and each kind of failure
        said = first_line(error)
        if "split" in said.lower() and split in said:
            name = source.removesuffix(f"[{split}]")
            raise ValueError(
                f"{source}: no split {split!r}; name one that it has, as in {name}[test] ({said})"
            ) from error
        raise ValueError(f"{source}: no such file, folder or data set ({said})") from error
