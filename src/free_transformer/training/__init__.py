"""One training loop for the Free Transformer and its baseline."""

from free_transformer.training.loop import train
from free_transformer.training.run import Run
from free_transformer.training.settings import Settings, SettingsError, load_settings

__all__ = ["Run", "Settings", "SettingsError", "load_settings", "train"]
