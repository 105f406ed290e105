"""
Reads tables with one document per row: JSON Lines, JSON, CSV, TSV, Parquet and data sets.

Files are read with the standard library, and Parquet with pyarrow, not with `datasets`. Only the text column matters
here: the types of other columns may vary from row to row, and errors can name the line.
"""

import csv
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from free_transformer.data.text_files import (
    DECOMPRESSORS,
    READ_ERRORS,
    TRAIN_EXTRA,
    UnreadableFile,
    format_of,
    open_bytes,
    open_text,
    reason,
)
from free_transformer.errors import InputError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

MAX_LISTED = 3  # bad rows per message
MAX_COLUMNS = 10  # columns per message
MAX_NAME = 40  # characters per column name in messages; without a header, these are the fields of the first row
MAX_SEARCHED = 10_000  # bad rows after which a file without any good row is rejected
MAX_FIELD = 2**31 - 1  # characters per field; the default of the csv module is 131,072
PARQUET_ROWS = 256  # rows in memory at a time
REPLACED_NUL = "\udc00"  # the csv module of Python 3.10 rejects NUL; no valid UTF-8 decodes to this character


class BadRow(str):
    """The reason why a row has no usable text."""


Row = tuple[str, int, object]  # "line" or "row", its number from 1, and its columns or a `BadRow`


def is_table(path: Path) -> bool:
    """Whether a file holds one document per row, by its suffix."""
    return format_of(path) in READERS


def read_table(path: Path, column: str, max_bad_rows: int) -> Iterator[str]:
    """
    Yields the text of each row of a file. Bad rows are skipped and reported in one warning.

    Raises:
        UnreadableFile: if the file cannot be read to its end or no row has text in the column.
        InputError: if a file with good rows has more than `max_bad_rows` bad ones, or a library is missing.
    """
    rows = READERS[format_of(path)](path, column)
    yield from good_texts(_with_read_errors(rows, str(path), READ_ERRORS), str(path), column, max_bad_rows)


def read_rows(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """
    Yields number and value of each row of a file that has text, or an integer, in the column.

    Raises:
        UnreadableFile: as `read_table`.
    """
    rows = READERS[format_of(path)](path, column)
    for _, number, row in _with_read_errors(rows, str(path), READ_ERRORS):
        value = row.get(column) if isinstance(row, Mapping) else None
        if isinstance(value, str | int):
            yield number, str(value)


def read_data_set(table: Iterable[object], name: str, column: str, max_bad_rows: int) -> Iterator[str]:
    """Same as `read_table`, for the rows of a data set, which messages call `name`."""

    def rows() -> Iterator[Row]:
        for number, row in enumerate(table, 1):
            yield "row", number, row

    # `datasets` raises a different class for each format and each kind of failure
    yield from good_texts(_with_read_errors(rows(), name, (Exception,)), name, column, max_bad_rows)


def good_texts(rows: Iterator[Row], name: str, column: str, max_bad_rows: int) -> Iterator[str]:
    """Yields the text of the good rows, see `read_table`."""
    bad, good = _BadRows(name, column), 0
    try:
        for unit, number, row in rows:
            text = _text_of(row, column)
            if isinstance(text, BadRow):
                bad.add(unit, number, row, text)
            else:
                good += 1
            if bad.count > max_bad_rows and (good or bad.count >= MAX_SEARCHED):
                raise InputError(bad.too_many(max_bad_rows)) if good else UnreadableFile(bad.no_good_one())
            if not isinstance(text, BadRow):
                yield text
    except UnreadableFile:
        if good and bad.count:
            warn_once(str(Path(name).absolute()), bad.skipped())
        raise
    if bad.count and not good:
        raise UnreadableFile(bad.no_good_one())
    if bad.count:
        warn_once(str(Path(name).absolute()), bad.skipped())


@cache
def warn_once(_about: str, message: str) -> None:
    """Logs a warning once per process, so that it is not repeated in each epoch."""
    logger.warning("%s", message)


def _text_of(row: object, column: str) -> str | BadRow:
    """Returns the text of a row, or the reason why it has none."""
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, Mapping):
        return BadRow(f"{_type(row)} instead of an object")
    if column not in row:
        return BadRow(f"no column {column!r}")
    text = row[column]
    if not isinstance(text, str):
        return BadRow(f"column {column!r} holds {_type(text)}")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRow(f"column {column!r} is not valid Unicode")
    return text


class _BadRows:
    """Counts the bad rows of a file and composes the messages about them."""

    def __init__(self, name: str, column: str):
        self.name, self.column, self.count = name, column, 0
        self.first: list[str] = []
        self.columns: dict[str, None] = {}  # columns of rows without the text column
        self.types: dict[str, None] = {}  # types of values that are not text
        self.has_column = False

    def add(self, unit: str, number: int, row: object, problem: BadRow) -> None:
        self.count += 1
        if len(self.first) < MAX_LISTED:
            self.first.append(f"{unit} {number} ({problem})")
        if isinstance(row, Mapping):
            if self.column not in row:
                self.columns |= dict.fromkeys(list(map(str, row))[: MAX_COLUMNS + 1])
            else:
                self.has_column = True
                if not isinstance(row[self.column], str):
                    self.types[_type(row[self.column])] = None

    def skipped(self) -> str:
        return f"{self.name}: skipped {self._listed()}"

    def too_many(self, allowed: int) -> str:
        return (
            f"{self.name}: {self._listed()}; at most data.max_bad_rows={allowed} are allowed: "
            f"correct the file, choose another data.column than {self.column!r}, or raise data.max_bad_rows"
        )

    def no_good_one(self) -> str:
        if self.columns and not self.has_column:
            return no_column(self.name, self.column, list(self.columns))
        if self.types:
            return f"{self.name}: column {self.column!r} holds {', '.join(self.types)}, not text (data.column)"
        return f"{self.name}: no row has text in column {self.column!r} (data.column): {self._listed()}"

    def _listed(self) -> str:
        more = f" and {self.count - MAX_LISTED} more" if self.count > MAX_LISTED else ""
        return f"{self.count} bad row{'s' * (self.count > 1)}: {', '.join(self.first)}{more}"


def no_column(name: str, column: str, columns: list[str]) -> str:
    """Returns the message for a table without the text column."""
    if not columns:
        return f"{name}: no column {column!r} (data.column); it has no columns"
    listed = [repr(each if len(each) <= MAX_NAME else each[:MAX_NAME] + "…") for each in columns[:MAX_COLUMNS]]
    more = ", …" if len(columns) > MAX_COLUMNS else ""
    return f"{name}: no column {column!r} (data.column); it has {', '.join(listed)}{more}"


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _with_read_errors(rows: Iterator[Row], name: str, errors: tuple[type[Exception], ...]) -> Iterator[Row]:
    """Yields the rows. Turns `errors` while reading into `UnreadableFile`, which names the last good row."""
    last = ""
    try:
        for row in rows:
            last = f"{row[0]} {row[1]}"
            yield row
    except UnreadableFile:
        raise
    except errors as error:
        where = f"ends unexpectedly after {last}" if last else "cannot be read"
        raise UnreadableFile(f"{name}: {where} ({reason(error)})") from error


def _json_lines(path: Path, column: str) -> Iterator[Row]:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield "line", number, _parse_json(line)


def _json(path: Path, column: str) -> Iterator[Row]:
    """Reads JSON Lines, one array of objects, or one object."""
    with open_text(path, newline="\n") as file:
        first = _parse_json(next((line for line in file if not line.isspace()), ""))
    if isinstance(first, BadRow | list):
        with open_text(path, newline="\n") as file:
            text = file.read()
        whole = _parse_json(text)
        if not isinstance(whole, BadRow):
            for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
                yield "row", number, row
            return
        if text.lstrip().startswith("["):
            raise UnreadableFile(f"{path}: {whole}")
    yield from _json_lines(path, column)


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return BadRow(f"not JSON: {error.msg} at {line}column {error.colno}")
    except (ValueError, RecursionError) as error:  # too many digits in a number, or too many nested brackets
        return BadRow(f"not JSON: {reason(error)}")


def _csv(path: Path, column: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    with open_text(path, newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter)
        header = next((row for row in reader if row), None)
        if header is None:
            return
        if column not in header:
            raise UnreadableFile(no_column(str(path), column, header))
        place = header.index(column)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield "line", line, BadRow(f"not a row of the table: {error}")
                continue
            if lines.ended:  # while the reader was looking for the end of a quoted field
                raise EOFError(f"the quotation mark that opens in line {line} is never closed")
            if fields:
                yield "line", line, _csv_row(fields, header, place)


def _csv_row(fields: list[str], header: list[str], place: int) -> dict[str, str] | BadRow:
    if len(fields) > len(header):  # an unquoted comma in the text; reading on would truncate it
        return BadRow(f"{len(fields)} fields under {len(header)} columns")
    if place >= len(fields):
        return BadRow(f"no column {header[place]!r}")
    if REPLACED_NUL in fields[place]:
        return BadRow(f"column {header[place]!r} contains NUL bytes")
    return {header[place]: fields[place]}


class _Lines:
    """Lines of a file for the csv module. `ended` is set when a line after the last one is requested."""

    def __init__(self, file: TextIO):
        self.file, self.ended = file, False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            self.ended = True
            raise StopIteration
        return line.replace("\0", REPLACED_NUL)


def _parquet(path: Path, column: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: Parquet files need the extra: {TRAIN_EXTRA}") from error
    if path.stat().st_size == 0:
        return
    with open_bytes(path) as file:
        try:
            table = ParquetFile(io.BytesIO(file.read()) if path.suffix.lower() in DECOMPRESSORS else file)
            if column not in table.schema_arrow.names:
                raise UnreadableFile(no_column(str(path), column, table.schema_arrow.names))
            numbers = count(1)
            for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in _values(batch.column(column)):
                    yield "row", next(numbers), value if isinstance(value, BadRow) else {column: value}
        except pyarrow.ArrowException as error:
            raise OSError(reason(error)) from error


def _values(array: "pyarrow.Array") -> Iterator[object]:
    try:
        yield from array.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for value in array:  # one by one, to find the damaged ones
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield BadRow("not UTF-8 text")


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}
