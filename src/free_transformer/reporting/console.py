"""Consoles that show names as they are, whatever characters they have and whatever becomes of the terminal."""

import contextlib
import sys
from typing import Any, TextIO

from rich.console import Console


def stdout_console() -> Console:
    """For results. Text is no markup: `[v2]` in the name of a run is part of the name."""
    return Console(markup=False, highlight=False, emoji=False)


def stderr_console(quiet: bool = False) -> Console:
    """For progress, which is never a reason for work to fail: where the terminal is gone, it is left out."""
    return Console(file=_Lasting(), quiet=quiet, markup=False, highlight=False, emoji=False)  # type: ignore[arg-type]


class _Lasting:
    """Standard error, looked up at every use, without the errors of a closed terminal, a closed pipe or a full disk."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def tolerate_any_encoding(*streams: TextIO) -> None:
    """Shows a replacement for characters that a terminal's encoding does not have, instead of failing."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook has replaced it
            stream.reconfigure(errors="replace")
