"""Loads settings from a YAML file and dotted overrides."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from free_transformer.data.text_files import reason
from free_transformer.errors import InputError, SettingsError
from free_transformer.files import few
from free_transformer.settings.checks import check_together
from free_transformer.settings.explain import explain
from free_transformer.settings.section import MOVED, Section, relocated, replace_checked
from free_transformer.settings.sections import SECTIONS, Settings
from free_transformer.settings.words import one_line
from free_transformer.settings.yaml_text import YamlError, load_yaml

NEEDED = "give a YAML file with sections of settings (model, training, data, ...)"


def load_settings(path: str | Path, overrides: list[str] | None = None, to_train: bool = True) -> Settings:
    """
    Loads and checks settings.

    Args:
        path: a YAML file.
        overrides: `section.name=value`, the value in YAML.
        to_train: whether to read `model.pretrained`, which may no longer exist when a trained run is loaded.

    Raises:
        SettingsError: for invalid settings. The message names the setting, its value and what is allowed.
    """
    path = Path(path)
    values = _read_sections(path)
    read = [override for text in overrides or [] for override in _Override.read(text)]
    _check_overrides(read)
    for override in read:
        override.apply(values)
    return parse_settings(values, str(path), to_train)


def load_baseline_settings(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """
    Loads the settings of a run's baseline: sets `model.kind=baseline`, and appends `-baseline` to the name of `run_dir`
    unless it already ends with `baseline`.

    Raises:
        SettingsError: as `load_settings`, and for a contradictory override of `model.kind`.
    """
    settings = load_settings(path, [*(overrides or []), "model.kind=baseline"])
    folder = settings.run_dir
    if not folder.name.endswith("baseline"):
        replace_checked(settings, run_dir=folder.with_name(f"{folder.name}-baseline"))
    return settings


def override_warnings(settings: Settings, overrides: list[str], source: str | Path) -> list[str]:
    """
    Returns a warning if overrides replace the training text but not the held-out text.

    Args:
        settings: settings loaded from the file `source` with `overrides`.
    """
    given = {override.name[:2] for text in overrides for override in _Override.read(text)}
    held_out = settings.data.validation
    if ("data", "train") not in given or given & {("data", "validation"), ("data",)} or not held_out:
        return []
    return [
        f"data.train is overridden, but data.validation={one_line(few(held_out))} still comes from {source}: held-out "
        "results will not describe your text; set data.validation to text that is not in data.train, or to [] for none"
    ]


def _read_sections(path: Path) -> dict[str, object]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
        if values is None:  # an empty file: all defaults
            values = {}
        if not isinstance(values, dict):
            raise SettingsError(f"not a settings file; {NEEDED}")
        for name, section in SECTIONS.items():
            if isinstance(values.get(name), dict):
                values[name] = _renamed(name, section, values[name])
        values = relocated(values)
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; {NEEDED}") from None
    except IsADirectoryError:
        config = path / "config.yaml"
        advice = f"give the file {config}" if config.is_file() else NEEDED
        raise SettingsError(f"{path}: is a folder, not a file; {advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as text ({reason(error)}); {NEEDED}") from error
    except InputError as error:
        raise SettingsError(f"{path}: {error}") from error
    return values


def _renamed(name: str, section: type[Section], values: dict[str, object]) -> dict[str, object]:
    try:
        return section.renamed(values)
    except ValueError as error:
        raise SettingsError(f"{name}: {error}") from error


def parse_settings(values: Mapping[str, object], source: str = "settings", to_train: bool = True) -> Settings:
    """Builds `Settings` from plain values; arguments and errors as in `load_settings`."""
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{source}: {explain(error)}") from error
    try:
        if settings.model.pretrained is None or to_train:
            settings.model.adopt()
            settings.model.build()
        check_together(settings)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from error
    return settings


@dataclass(frozen=True)
class _Override:
    """
    An override `section.name=value`, or one setting of `section={name: value, ...}`.

    Attributes:
        text: the override as given.
        name: parts of the setting's current name.
    """

    text: str
    name: tuple[str, ...]
    value: object

    @classmethod
    def read(cls, text: str) -> "list[_Override]":
        name, equals, given = text.partition("=")
        first, *rest = name.split(".")
        if not equals or not all((first, *rest)):
            raise SettingsError(
                f"{text!r}: an override needs the form section.name=value, such as training.learning_rate=3e-4"
            )
        try:
            value = load_yaml(given)
        except YamlError as error:
            raise SettingsError(f"{text!r}: {error}") from error
        section = SECTIONS.get(first)
        if section and not rest and isinstance(value, dict):
            return [cls(text, _place(first, name), each) for name, each in _renamed(first, section, value).items()]
        if section and rest:
            rest[0] = section.other_names.get(rest[0], rest[0])
            return [cls(text, (*_place(first, rest[0]), *rest[1:]), value)]
        return [cls(text, (first, *rest), value)]

    def apply(self, values: dict[str, Any]) -> None:
        """Sets the value in `values`. Copies the sections on the path, so that YAML aliases of them do not change."""
        *sections, last = self.name
        for section in sections:
            inner = values.get(section)
            if inner is not None and not isinstance(inner, dict):
                raise SettingsError(f"{self.text!r}: {section!r} is a setting, not a section")
            values[section] = dict(inner or {})
            values = values[section]
        values[last] = self.value


def _place(section: str, name: str) -> tuple[str, ...]:
    """Returns the section and name where a setting is stored."""
    return MOVED.get(name, (section, name)) if section == "training" else (section, name)


def _check_overrides(overrides: list[_Override]) -> None:
    """Raises `SettingsError` if a setting is given twice, with different values or under different names."""
    known: dict[tuple[str, ...], _Override] = {}
    for override in overrides:
        other = known.setdefault(override.name, override)
        names = [each.text.partition("=")[0] for each in (other, override)]
        same_name = names[0] == names[1] or any("." not in name for name in names)
        if repr(other.value) != repr(override.value) or not same_name:
            texts = f"{one_line(other.text)} and {one_line(override.text)}"
            raise SettingsError(f"{texts}: {one_line('.'.join(override.name))} is given twice; keep one of them")
