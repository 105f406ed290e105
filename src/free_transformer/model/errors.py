"""Errors that the user can fix. Any other exception is a bug in this library and keeps its traceback."""


class UserError(Exception):
    """The message says what is wrong, what is allowed, and what to do. The command line prints it as one line."""


class InputError(UserError, ValueError):
    """A value, a file or a combination of arguments that cannot be used."""


class NotSupported(UserError, NotImplementedError):
    """An option of another library that has no meaning for a model with a plan."""
