"""Consoles that print names unchanged, whatever characters they contain, and that survive a closed terminal."""

import contextlib
import re
import sys
from typing import TextIO, cast

from rich.console import Console

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str, keep: str = "\n\t") -> str:
    """
    A text with its control characters escaped, as in `\\x1b`, so that it cannot move the cursor or change colors.

    Args:
        keep: control characters that stay; none for a text in one line.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        code = ord(character)
        return ESCAPES.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return CONTROL.sub(escape, text)


def stdout_console() -> Console:
    """For results. Text is not markup: `[v2]` in the name of a run is part of the name."""
    return Console(markup=False, highlight=False, emoji=False)


def stderr_console(quiet: bool = False) -> Console:
    """For progress. If the terminal is closed, the output is dropped, so that the work does not fail."""
    stderr = cast(TextIO, _TolerantStderr())
    return Console(file=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)


class _TolerantStderr:
    """Standard error, looked up at each use, which ignores a closed terminal, a closed pipe and a full disk."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stderr, name)


def tolerate_any_encoding(*streams: TextIO) -> None:
    """Prints a replacement for characters that the terminal's encoding does not have, instead of failing."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # tests and notebooks may have replaced it
            stream.reconfigure(errors="replace")
