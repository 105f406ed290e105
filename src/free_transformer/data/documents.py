"""Documents from files, folders, `.jsonl`, `.parquet` and `datasets`, one text at a time."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from free_transformer.files import first_line
from free_transformer.synthetic_data import letters

logger = logging.getLogger(__name__)

TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # read by `datasets`, a document a row


def read_documents(sources: Sequence[str | Path], column: str = "text", split: str = "train") -> Iterator[str]:
    """
    Yields the documents of each source in a fixed order, without holding more than one file's text.

    Args:
        sources: text files (a document each), folders (all text files below, by name), `.jsonl` and `.parquet` files
            (a document a row), `letters:COUNT:SEED` (the paper's synthetic task), or names that
            `datasets.load_dataset` knows (`name` or `name:configuration`).
        column: the text's column in tables and data sets.
        split: the split of data sets.

    Raises:
        ValueError: for a source that is missing, empty or not UTF-8 text, or a table without the column.
    """
    if not sources:
        raise ValueError("no data: name at least one file, folder or data set")
    for source in sources:
        path = Path(source)
        found = False
        for document in _read_source(path, str(source), column, split):
            if document.strip():
                found = True
                yield document
        if not found:
            raise ValueError(f"{source}: there is no text in it")


def _read_source(path: Path, name: str, column: str, split: str) -> Iterator[str]:
    if synthetic := re.fullmatch(r"letters:(\d+)(?::(\d+))?", name):
        yield from letters(int(synthetic[1]), seed=int(synthetic[2] or 0))
    elif path.is_dir():
        yield from _read_folder(path, column)
    elif path.is_file():
        yield from _read_file(path, column)
    elif path.suffix or path.is_absolute() or name.endswith("/") or name.startswith("."):
        raise ValueError(f"{name}: no such file or folder")
    else:
        configuration = name.split(":", 1)
        yield from _texts(_load_dataset(name, *configuration, split=split), column, name)


def _read_folder(folder: Path, column: str) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            yield from _read_file(path, column)
        except ValueError as error:  # one bad file among many is no reason to stop
            logger.warning("left out: %s", error)


def _read_file(path: Path, column: str) -> Iterator[str]:
    if path.suffix in TABLES:
        table = _load_dataset(str(path), TABLES[path.suffix], data_files=str(path), split="train")
        yield from _texts(table, column, str(path))
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise ValueError(f"{path}: not text (it has NUL bytes)")
    yield text


def _load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("tables and data sets need the extra: pip install 'free-transformer-lm[train]'") from error
    try:  # streaming reads what is asked for and leaves no copy in a cache
        return datasets.load_dataset(*args, streaming=True, **kwargs)
    except Exception as error:  # `datasets` raises a different class for each format and each kind of failure
        raise ValueError(f"{name}: no such file, folder or data set ({first_line(error)})") from error


def _texts(table: Any, column: str, name: str) -> Iterator[str]:
    try:
        rows = iter(table)
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as a table ({first_line(error)})") from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"{name}: cannot be read as a table ({first_line(error)})") from error
        if column not in row:
            raise ValueError(f"{name}: no column {column!r} (data.column); it has {', '.join(map(repr, row))}")
        if not isinstance(row[column], str):
            raise ValueError(f"{name}: column {column!r} holds {type(row[column]).__name__}, not text")
        yield row[column]
