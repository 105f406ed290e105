"""
Errors that a person can act on.

`UserError` is the base class. The command line prints such an error as one line; any other exception keeps its
traceback. `InputError` and the base class are in `model/errors.py`, since the model raises them too.
"""

from free_transformer.model.errors import InputError, NotSupported, UserError

__all__ = ["DataError", "InputError", "MissingDependency", "NotSupported", "RunError", "SettingsError", "UserError"]


class SettingsError(InputError):
    """Settings that cannot be used; the message says which, what is allowed and what to do."""


class DataError(InputError):
    """Text, a tokenizer or a data set that cannot be read."""


class RunError(UserError, RuntimeError):
    """A training, an evaluation or a server that cannot continue."""


class MissingDependency(UserError, ImportError):
    """An optional package that is not installed; the message names what to install."""
