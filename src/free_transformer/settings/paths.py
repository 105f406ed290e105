"""Paths in settings: expands home folders and environment variables, and makes sources absolute."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer
from pydantic_core import PydanticKnownError

from free_transformer.data.documents import is_path_source
from free_transformer.errors import InputError
from free_transformer.settings.words import one_line

VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([^{}\n]*)\})", re.ASCII)


def expand(text: str) -> str:
    """Expands the home folder and environment variables in a path; `$$` is a dollar sign."""
    if not text:
        raise InputError("is empty; give a file or folder")
    home, slash, rest = text.partition("/")
    if home.startswith("~"):
        folder = os.path.expanduser(home)  # noqa: PTH111 - Path raises for users without a home folder
        if folder == home:
            raise InputError(f"the home folder {one_line(home)} is unknown; give the full path")
        return folder + slash + _fill_in(rest)
    return _fill_in(text)


def _fill_in(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            return "$"
        if name not in os.environ:
            raise InputError(f"the environment variable {name} is not set; set it, or use $$ for a dollar sign")
        return os.environ[name]

    return VARIABLE.sub(value, text)


def _escape(path: str | Path) -> str:
    """Returns the text that `expand` turns into this path."""
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _expand_sources(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [expand(each) if isinstance(each, str) else each for each in value]
    if isinstance(value, dict):
        names = {name: expand(name) if isinstance(name, str) else name for name in value}
        check_distinct(names)
        return {names[name]: share for name, share in value.items()}
    return value


def check_distinct(names: Mapping[str, str]) -> None:
    """Raises `ValueError` if two sources of a mixture are the same, since a share would be lost."""
    known: dict[str, str] = {}
    for name, meant in names.items():
        if (other := known.setdefault(meant, name)) != name:
            raise InputError(f"{one_line(other)} and {one_line(name)} are the same source; give it a single share")


def _escape_sources(sources: object) -> object:
    if isinstance(sources, dict):
        return {_escape(name): share for name, share in sources.items()}
    return [_escape(each) for each in sources] if isinstance(sources, list) else sources


def absolute_sources(sources: Any) -> Any:
    def absolute(source: str) -> str:
        return str(Path(source).absolute()) if is_path_source(source) else source

    if isinstance(sources, dict):
        return {absolute(name): share for name, share in sources.items()}
    return None if sources is None else [absolute(each) for each in sources]


def _refuse_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


# Text from the user is expanded, a `Path` is not. Serialized paths are escaped.
PathText = Annotated[
    str,
    BeforeValidator(lambda value: expand(value) if isinstance(value, str) else value),
    PlainSerializer(_escape, when_used="unless-none"),
]
Folder = Annotated[
    Path,
    BeforeValidator(lambda value: Path(expand(value)) if isinstance(value, str) else value),
    PlainSerializer(_escape, when_used="json"),
]
Share = Annotated[float, Field(gt=0), BeforeValidator(_refuse_boolean)]
Sources = Annotated[  # a list of sources, or the shares of a mixture
    list[str] | dict[str, Share], BeforeValidator(_expand_sources), PlainSerializer(_escape_sources)
]
SourceList = Annotated[list[str], BeforeValidator(_expand_sources), PlainSerializer(_escape_sources)]
