"""Formats values and choices for messages."""

from pathlib import Path
from types import NoneType

PYTHON_TYPES = {
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}
TYPES = {  # by the first word of pydantic's error names
    **{kind.__name__: words for kind, words in PYTHON_TYPES.items()},
    "string": "text",
    "path": "a path",
    "finite": "a finite number",
    "model": "a section of settings",
}


def one_line(text: str) -> str:
    """Formats a name for a message: quoted and escaped if it has line breaks or other control characters."""
    return text if text.isprintable() else repr(text)


def shown(value: object) -> str:
    """Formats a value for a message, with constants as in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(str(value) if isinstance(value, Path) else value)


def either(phrases: list[str]) -> str:
    """Joins phrases: `a, b or c`."""
    return " or ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
