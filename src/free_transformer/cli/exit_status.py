"""Exit status of commands. Errors that the user can fix become one line."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from free_transformer.errors import InputError, UserError

# typer vendors click's classes under names that differ between versions; this works in all of them
UsageError: Any = typer.BadParameter.__base__
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def as_command(debug: bool = False) -> Iterator[None]:
    """
    Runs a command or a script. Errors that the user can fix become one line on standard error.

    These errors are `UserError`, wrong usage of the command line, errors of the operating system about a file or disk,
    and a GPU without enough memory. Any other exception is a bug in this library and keeps its traceback. Messages of
    `transformers` are suppressed.

    Args:
        debug: raise all errors except wrong usage.

    Raises:
        SystemExit: with status 2 for `InputError` and wrong usage, 1 for the other errors above. A training that is
            stopped by a signal raises it with status 128 + the signal number.
    """
    if sys.modules.get("transformers"):  # a later import reads the settings of `quiet`
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    try:
        yield
    except UsageError as error:
        fail(f"{error.format_message()} (see --help)", BAD_INPUT)
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            raise
        fail(message, BAD_INPUT if isinstance(error, InputError) else FAILED)


def _message(error: Exception) -> str | None:
    """Returns the message for the user, None for an error that the user cannot act on."""
    if isinstance(error, UserError):
        return str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or str(error)
        return reason if error.filename is None else f"{error.filename}: {reason}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's class, without importing torch
        return f"out of memory; use a smaller batch ({error})"
    return None


def fail(message: str, status: int) -> NoReturn:
    """Prints one line on standard error, with the rank if there are several processes, and exits."""
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"free-transformer: error{rank}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
