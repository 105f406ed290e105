"""Consoles that print text without interpreting markup, and that tolerate a closed terminal."""

import contextlib
import re
import sys
from typing import TextIO, cast

from rich.console import Console

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str, keep: str = "\n\t") -> str:
    """
    Escapes control characters in a text, as in `\\x1b`, so that it cannot move the cursor or change colors.

    Args:
        keep: control characters that are not escaped; empty to get a single line.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        code = ord(character)
        return ESCAPES.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return CONTROL.sub(escape, text)


def stdout_console() -> Console:
    """Returns a console for results. It does not interpret markup, such as `[v2]` in the name of a run."""
    return Console(markup=False, highlight=False, emoji=False)


def stderr_console(quiet: bool = False) -> Console:
    """Returns a console for progress. If the terminal is closed, it drops the output instead of failing."""
    stderr = cast(TextIO, _TolerantStderr())
    return Console(file=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)


class _TolerantStderr:
    """Standard error, looked up at each use. Ignores a closed terminal, a closed pipe and a full disk."""

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
        if hasattr(stream, "reconfigure"):  # tests and notebooks may replace the stream
            stream.reconfigure(errors="replace")
