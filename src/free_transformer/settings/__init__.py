"""Settings of a run: sections, a YAML file with dotted overrides, cross-field checks, and errors that help."""

from free_transformer.errors import SettingsError
from free_transformer.settings.checks import settings_warnings
from free_transformer.settings.loading import describe_settings, load_settings, parse_settings
from free_transformer.settings.paths import Sources
from free_transformer.settings.sections import (
    DECIDED_BY,
    DataSettings,
    DistributedSettings,
    LoggingSettings,
    ModelSettings,
    Precision,
    Schedule,
    Section,
    Settings,
    StageSettings,
    TableOptimizer,
    TrainingSettings,
)

__all__ = [
    "DECIDED_BY",
    "DataSettings",
    "DistributedSettings",
    "LoggingSettings",
    "ModelSettings",
    "Precision",
    "Schedule",
    "Section",
    "Settings",
    "SettingsError",
    "Sources",
    "StageSettings",
    "TableOptimizer",
    "TrainingSettings",
    "describe_settings",
    "load_settings",
    "parse_settings",
    "settings_warnings",
]
