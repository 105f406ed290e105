"""JSON lines, the format of `metrics.jsonl` and `history.jsonl`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from free_transformer.files import write_text

JsonObject = dict[str, Any]  # as parsed by `json`


def read_lines(file: Path) -> list[JsonObject]:
    """Returns the objects of a file, [] if it does not exist. Ignores an incomplete last line, left by a crash."""
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def write_lines(file: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes lines to a file, replacing its contents."""
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def append_line(file: Path, line: Mapping[str, object]) -> None:
    """Appends a line. Raises an `OSError` that names the file, unlike the original error for a full disk."""
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
