"""Opens files as text: handles compression, encodings, and unreadable files."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, cast

from free_transformer.errors import DataError, InputError
from free_transformer.files import first_line

TRAIN_EXTRA = "pip install 'free-transformer-lm[train]'"
READ_ERRORS = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)  # raised while reading a file

BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


class UnreadableFile(DataError):
    """A file that cannot be read as text. Reading a folder skips it."""


def read_text_file(path: Path) -> str:
    """
    Reads a file as one document, without its byte order mark and with `\\n` as line ending.

    Raises:
        UnreadableFile: if the file cannot be read, is not UTF-8, or contains NUL bytes. UTF-16 and UTF-32 are accepted
            with a byte order mark.
    """
    try:
        with open_bytes(path) as file:
            data = file.read()
    except READ_ERRORS as error:
        raise UnreadableFile(f"{path}: cannot be read ({reason(error)})") from error
    mark, encoding = _encoding(data)
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        label = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise UnreadableFile(
            f"{path}: not {label} text (byte {error.start + len(mark)}); save it as UTF-8 text"
        ) from error
    if "\0" in text:
        raise UnreadableFile(f"{path}: not text (it contains NUL bytes); save it as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_text(path: Path, newline: str | None) -> TextIO:
    """
    Opens a file as a text stream, after its byte order mark. Invalid UTF-8 bytes become lone surrogates, so that the
    rows around a damaged one can still be read.
    """
    file = open_bytes(path)
    mark, encoding = _encoding(file.peek(len(codecs.BOM_UTF32_LE)))
    file.read(len(mark))
    errors = "surrogateescape" if encoding == "utf-8" else "strict"
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)


def open_bytes(path: Path) -> io.BufferedReader:
    """Opens a file for reading. Files ending in `.gz`, `.bz2`, `.xz` and `.zst` are decompressed."""
    decompress = DECOMPRESSORS.get(path.suffix.lower())
    if decompress is None or path.stat().st_size == 0:  # not a valid archive, but not an error
        return path.open("rb")
    return cast(io.BufferedReader, decompress(path))


def format_of(path: Path) -> str:
    """Returns the suffix that determines the format of a file, in lower case and without a compression suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in DECOMPRESSORS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def reason(error: BaseException) -> str:
    """Returns the message of an error in one line, without the file name."""
    return getattr(error, "strerror", None) or first_line(error)


def _encoding(start: bytes) -> tuple[bytes, str]:
    """Returns the byte order mark of these bytes, empty if there is none, and their encoding."""
    return next((known for known in BYTE_ORDER_MARKS if start.startswith(known[0])), (b"", "utf-8"))


def _open_zstd(path: Path) -> io.BufferedReader:
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"{path}: .zst files need the extra: {TRAIN_EXTRA}") from error
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


DECOMPRESSORS: dict[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
