"""Bytes of files as text: compression, encodings, and files that cannot be read."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from free_transformer.files import first_line

TRAIN_EXTRA = "pip install 'free-transformer-lm[train]'"
READ_ERRORS = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError)  # raised while a file is read

BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


class UnreadableFile(ValueError):
    """A file that cannot be read as text. A folder is read without it."""


def read_text_file(path: Path) -> str:
    """
    The text of a file as one document, without its byte order mark and with `\\n` at the end of each line.

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
        raise UnreadableFile(f"{path}: not {label} text (byte {error.start + len(mark)})") from error
    if "\0" in text:
        raise UnreadableFile(f"{path}: not text (it has NUL bytes)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_text(path: Path, newline: str | None) -> TextIO:
    """
    Opens a file as a stream of text after its byte order mark. Bytes that are not UTF-8 become lone surrogates, so that
    a damaged row does not hide the others.
    """
    file = open_bytes(path)
    mark, encoding = _encoding(file.peek(len(codecs.BOM_UTF32_LE)))
    file.read(len(mark))
    errors = "surrogateescape" if encoding == "utf-8" else "strict"
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)


def open_bytes(path: Path) -> io.BufferedReader:
    """Opens a file for reading. Files ending in `.gz`, `.bz2`, `.xz` and `.zst` are decompressed."""
    decompress = DECOMPRESSORS.get(path.suffix.lower())
    if decompress is None or path.stat().st_size == 0:  # an empty file is no valid archive, but it has no text either
        return path.open("rb")
    return cast(io.BufferedReader, decompress(path))


def format_of(path: Path) -> str:
    """The suffix that decides how a file is read: in lower case, and without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in DECOMPRESSORS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def reason(error: BaseException) -> str:
    """What an error says about a file, in one line and without the name of the file."""
    return getattr(error, "strerror", None) or first_line(error)


def _encoding(start: bytes) -> tuple[bytes, str]:
    """The byte order mark that these bytes begin with, and their encoding."""
    return next((known for known in BYTE_ORDER_MARKS if start.startswith(known[0])), (b"", "utf-8"))


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path}: .zst files need the extra: {TRAIN_EXTRA}") from error
    return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression="zstd")))


DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
