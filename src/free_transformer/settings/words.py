"""Values and choices in messages."""

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
TYPES = {  # by the first word of the names of pydantic's errors
    **{kind.__name__: words for kind, words in PYTHON_TYPES.items()},
    "string": "text",
    "path": "a path",
    "finite": "a finite number",
    "model": "a section of settings",
}


def one_line(text: str) -> str:
    """A name for a message: in quotes, with escapes, where it has line breaks or other control characters."""
    return text if text.isprintable() else repr(text)


def shown(value: object) -> str:
    """A value in a message, constants as YAML has them."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(str(value) if isinstance(value, Path) else value)


def either(phrases: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
