"""One training loop for the Free Transformer and its baseline."""

from free_transformer.runs.run import Run
from free_transformer.settings import Settings, SettingsError, load_settings
from free_transformer.training.loop import train

__all__ = ["Run", "Settings", "SettingsError", "load_settings", "train"]
