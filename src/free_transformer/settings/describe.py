"""Descriptions of all settings, with their defaults, by section."""

from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from free_transformer.settings.sections import SECTIONS, Settings
from free_transformer.settings.training_sections import StageSettings

COMMON = (  # settings that most runs set
    *("run_dir", "data.train", "data.validation", "training.max_steps", "training.batch_size", "training.seq_len"),
    *("training.learning_rate", "model.hidden_dim", "model.num_layers", "model.latent_dim"),
)


@dataclass(frozen=True)
class SettingDescription:
    """
    Attributes:
        name: name as in an override, `section.name`.
        default: default value as in an override.
    """

    name: str
    default: str
    text: str


def describe_settings() -> dict[str, list[SettingDescription]]:
    """Returns the settings of each section by its name. Settings outside of sections are in the first one, `run`."""
    found: dict[str, list[SettingDescription]] = {"run": []}
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            found[name] = _describe(name, SECTIONS[name])
        else:
            found["run"].append(_describe_one(name, field))
    return found


def common_settings() -> list[SettingDescription]:
    """Returns the settings of `COMMON`, in this order."""
    known = {each.name: each for section in describe_settings().values() for each in section}
    return [known[name] for name in COMMON]


def _describe(section: str, kind: type[BaseModel]) -> list[SettingDescription]:
    found = []
    for key, field in kind.model_fields.items():
        found.append(_describe_one(f"{section}.{key}", field))
        if field.annotation == list[StageSettings]:
            found += _describe(f"{section}.{key}[]", StageSettings)
    return found


def _describe_one(name: str, field: FieldInfo) -> SettingDescription:
    default = field.get_default(call_default_factory=True)
    return SettingDescription(name, _as_yaml(default), field.description or "")


def _as_yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return value if isinstance(value, str) else str(value)
