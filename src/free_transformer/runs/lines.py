"""JSON lines, the format of `metrics.jsonl` and `history.jsonl`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from free_transformer.files import write_text

JsonObject = dict[str, Any]  # as `json` reads it


def read_lines(file: Path) -> list[JsonObject]:
    """The objects of a file, [] if it does not exist. A last line that a crash cut short is left out."""
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
    """Replaces a file."""
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def append_line(file: Path, line: Mapping[str, object]) -> None:
    """Raises `OSError` that names the file: the error of a full disk does not."""
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
