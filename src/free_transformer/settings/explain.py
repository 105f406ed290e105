"""Explains pydantic's errors: the setting, its value, what is allowed, and what to do."""

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from free_transformer.settings.section import leaves
from free_transformer.settings.sections import SECTIONS, Settings
from free_transformer.settings.training_sections import StageSettings
from free_transformer.settings.words import PYTHON_TYPES, TYPES, either, one_line, shown

MEMBER = re.compile(
    r"(constrained-)?int|(literal|function|list|dict).*\[.*|\[key\]"
)  # members of a union, as pydantic names them
BOUNDS = {"ge": "greater than or equal to", "gt": "greater than", "le": "less than or equal to", "lt": "less than"}
BOUND_ERRORS = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")


def explain(error: ValidationError) -> str:
    """Explains all errors, with one sentence per setting: its value, what is allowed, and what to do."""
    found: dict[str, list[ErrorDetails]] = {}
    for each in _nearest(error.errors()):
        found.setdefault(".".join(_location(each)), []).append(each)
    return "; ".join(_explain_one(name, errors) for name, errors in found.items())


def _nearest(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """For an error inside a list or mapping, drops pydantic's additional error about the type of the whole value."""
    of_types = [error for error in errors if error["type"] in ("list_type", "dict_type")]
    inside = {error["loc"][:2] for error in errors if error not in of_types}
    return [error for error in errors if error not in of_types or error["loc"][:2] not in inside]


def _location(error: ErrorDetails) -> list[str]:
    location = [one_line(str(part)) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return location
    return [part for part in location if not MEMBER.fullmatch(part)]  # the members of a union


def _explain_one(name: str, errors: list[ErrorDetails]) -> str:
    """Explains the errors of one setting. Several errors belong to the members of a union."""
    first = errors[0]
    location, value = _location(first), first["input"]
    if first["type"] == "extra_forbidden":
        return _explain_unknown(location)
    if first["type"] == "invalid_key":
        return f"{name}: the name of a setting must be text"
    field = _find_field(location)
    for error in errors:
        if error["type"] == "value_error":
            given = name if isinstance(value, dict) else f"{name}={shown(value)}"
            return f"{given}: {error['ctx']['error']}"
    if value is None:
        return f"{name}: is empty; give it a value, or remove it{_default(field, ' for the default, ')}"
    allowed = list(dict.fromkeys(phrase for error in errors for phrase in _requirement(error, field)))
    if "a list" in allowed and field and str in leaves(field.annotation):
        allowed.insert(0, "text")  # for a list with one item
    text = f"{name}={shown(value)}: must be {either(allowed)}"
    if isinstance(value, int | float) and {"text", "a path"} & set(allowed):
        return f"{text}; put it in quotes{_quoted(location, value) if field else ''}"
    return text + _default(field, "; the default is ")


def _quoted(location: list[str], value: object) -> str:
    return f""", as in {location[-1]}: '{shown(value)}' (in a shell "{".".join(location)}='{shown(value)}'")"""


def _explain_unknown(location: list[str]) -> str:
    section: Any = Settings
    for part in location[:-1]:
        section = get_args(section)[0] if part.isdigit() else section.model_fields[part].annotation
    name, last = ".".join(location), location[-1]
    first, dot, rest = last.partition(".")
    if dot and section is Settings and first in SECTIONS:
        return f"unknown setting {name!r}: in a file, write {first}: {{{rest}: ...}}"
    near = difflib.get_close_matches(last, section.model_fields, n=1, cutoff=0.5)
    known = f"did you mean {near[0]!r}?" if near else f"known settings are {', '.join(section.model_fields)}"
    return f"unknown setting {name!r}: {known}"


def _find_field(location: list[str]) -> FieldInfo | None:
    """Returns the setting at a location, or None inside a list or mapping."""
    section: type[BaseModel] | None = Settings
    field = None
    for part in location:
        if part.isdigit() and field is not None and field.annotation == list[StageSettings]:
            section, field = StageSettings, None
        elif section is not None and part in section.model_fields:
            field = section.model_fields[part]
            section = SECTIONS.get(part) if section is Settings else None
        else:
            return None
    return field


def _requirement(error: ErrorDetails, field: FieldInfo | None) -> list[str]:
    """Describes what is allowed."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUND_ERRORS:
        found = [] if field is None else field.metadata
        bounds = [(name, getattr(each, name)) for each in found for name in BOUNDS if hasattr(each, name)]
        return [" and ".join(f"{BOUNDS[name]} {_bound(bound)}" for name, bound in bounds or context.items())]
    if kind == "literal_error":
        return [context["expected"]]
    if kind == "string_too_short":
        return ["text that is not empty"]
    if kind == "boolean":
        return _allowed(field.annotation) if field else []
    message: str = error["msg"].removeprefix("Input should be ")
    return [TYPES.get(kind.split("_")[0], message[0].lower() + message[1:])]


def _bound(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(kind: Any) -> list[str]:
    """Describes the members of an annotation."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [repr(member) for member in members]
    if origin is Annotated:
        return _allowed(members[0])
    if origin in (Union, UnionType):
        return [phrase for member in members for phrase in _allowed(member)]
    return [PYTHON_TYPES.get(origin or kind, "a section of settings")]


def _default(field: FieldInfo | None, words: str) -> str:
    default = None if field is None else field.default
    return f"{words}{shown(default)}" if isinstance(default, str | int | float | Path) else ""
