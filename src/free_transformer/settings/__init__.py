"""Settings of a run: sections, a YAML file with dotted overrides, cross-field checks, and helpful errors."""

from free_transformer.errors import SettingsError
from free_transformer.settings.checks import settings_warnings
from free_transformer.settings.describe import SettingDescription, common_settings, describe_settings
from free_transformer.settings.loading import (
    load_baseline_settings,
    load_settings,
    override_warnings,
    parse_settings,
)
from free_transformer.settings.model_section import DECIDED_BY, ModelSettings
from free_transformer.settings.paths import Sources
from free_transformer.settings.section import Section
from free_transformer.settings.sections import DataSettings, DistributedSettings, LoggingSettings, Settings
from free_transformer.settings.training_sections import (
    CheckpointSettings,
    CodebookOptimizer,
    CurriculumSettings,
    EvaluationSettings,
    OptimizerSettings,
    Precision,
    Schedule,
    StageSettings,
    TrainingSettings,
)

__all__ = [
    "DECIDED_BY",
    "CheckpointSettings",
    "CodebookOptimizer",
    "CurriculumSettings",
    "DataSettings",
    "DistributedSettings",
    "EvaluationSettings",
    "LoggingSettings",
    "ModelSettings",
    "OptimizerSettings",
    "Precision",
    "Schedule",
    "Section",
    "SettingDescription",
    "Settings",
    "SettingsError",
    "Sources",
    "StageSettings",
    "TrainingSettings",
    "common_settings",
    "describe_settings",
    "load_baseline_settings",
    "load_settings",
    "override_warnings",
    "parse_settings",
    "settings_warnings",
]
