"""Reads and writes YAML 1.2 with unique keys, by `ruamel.yaml`. Dates stay text, and every error is one line."""

import io
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from free_transformer.errors import SettingsError

T = TypeVar("T")

TAG = "tag:yaml.org,2002:"
# Text that YAML 1.1 parses as another type. It is quoted, so that other programs also read it as text.
YAML_1_1 = re.compile(r"(?i:y|n|yes|no|on|off)|[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")


class YamlError(SettingsError):
    """Text is not YAML 1.2 with unique keys. The message is one line with the line number."""


def load_yaml(text: str) -> object:
    """
    Returns the value of a YAML document: None, a scalar, a list or a dictionary. Dates and times are text.

    Raises:
        YamlError: for a syntax error, a key that is set twice, or a tag that is not part of YAML's core schema.
    """
    return _read(text, _yaml().load)


def split_yaml_list(text: str) -> list[str]:
    """
    Splits a flow list without brackets into its items as written: `8, '16,17'` has the items `8` and `'16,17'`.

    Raises:
        YamlError: for a syntax error, or an item that is empty.
    """
    listed = f"[{text}]"
    node = _read(listed, _yaml().compose)
    if not isinstance(node, SequenceNode) or node.end_mark.index != len(listed):
        raise YamlError("not YAML: unmatched closing bracket")
    return [listed[item.start_mark.index : item.end_mark.index] for item in node.value]


def dump_yaml(values: Mapping[str, object]) -> str:
    """Writes nested dictionaries, lists and scalars as YAML, which `load_yaml` reads as equal values in equal order."""
    stream = io.StringIO()
    _yaml().dump(dict(values), stream)
    return stream.getvalue()


class _Constructor(SafeConstructor):
    pass


_Constructor.add_constructor(f"{TAG}timestamp", SafeConstructor.construct_yaml_str)


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> object:
        style = '"' if not data.isprintable() else "'" if YAML_1_1.fullmatch(data) else None
        return self.represent_scalar(f"{TAG}str", data, style=style)

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "e" in node.value and "." not in node.value:  # YAML 1.1 reads 1e-05 as text
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 2**20  # one line per setting
    return yaml


def _read(text: str, read: Callable[[str], T]) -> T:
    if re.search(r"^%YAML", text, flags=re.MULTILINE):  # YAML 1.1: 010 would be 8, and yes would be true
        raise YamlError("%YAML: settings are read as YAML 1.2; remove this line")
    try:
        return read(text)
    except DuplicateKeyError as error:
        key = re.search(r'duplicate key "(.*?)" with value', error.problem)
        name = key[1] if key else "a key"
        raise YamlError(f"line {error.problem_mark.line + 1}: {name} is set twice; keep one") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join((error.problem or error.context or "cannot be read").split())
        raise YamlError(f"not YAML: {where}{problem}; put text with special characters in quotes") from error
    except RecursionError:
        raise YamlError("not YAML: lists or mappings are nested too deeply") from None
    except (YAMLError, ValueError, TypeError) as error:  # for invalid characters, numbers and keys
        raise YamlError(f"not YAML: {' '.join(str(error).split())}") from error
