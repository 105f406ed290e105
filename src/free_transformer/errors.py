"""
Errors that the user can fix.

`UserError` is the base class. The command line prints such an error as one line; any other exception keeps its
traceback. `InputError` and the base class are in `model/errors.py`, since the model raises them too.
"""

from free_transformer.model.errors import InputError, NotSupported, UserError

__all__ = ["DataError", "InputError", "MissingDependency", "NotSupported", "RunError", "SettingsError", "UserError"]


class SettingsError(InputError):
    """Invalid settings; the message names the setting, what is allowed and what to do."""


class DataError(InputError):
    """Text, a tokenizer or a data set that cannot be read."""


class RunError(UserError, RuntimeError):
    """Training, an evaluation or a server cannot continue."""


class MissingDependency(UserError, ImportError):
    """An optional package is not installed; the message says what to install."""
