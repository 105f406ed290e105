"""
The command line. Each command parses its options, calls the library and prints the result.

Commands import heavy modules inside their functions, so that `--help` is fast and `serve --onnx` runs without torch.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer

from free_transformer import quiet  # noqa: F401  # before what it quiets
from free_transformer.cli.compare import compare
from free_transformer.cli.convert import convert
from free_transformer.cli.evaluate import evaluate
from free_transformer.cli.export import export
from free_transformer.cli.generate import generate
from free_transformer.cli.lm_eval import lm_eval
from free_transformer.cli.options import PATH_OPTIONS
from free_transformer.cli.plan import plan
from free_transformer.cli.report import report
from free_transformer.cli.reproduce import reproduce
from free_transformer.cli.serve import serve
from free_transformer.cli.sweep import sweep
from free_transformer.cli.tokenizer import tokenizer
from free_transformer.cli.train import TrainCommand, train
from free_transformer.cli.watch import watch
from free_transformer.errors import InputError, UserError
from free_transformer.reporting.console import tolerate_any_encoding

# typer carries click's classes under a name that has changed; this one is theirs in every version
UsageError: Any = typer.BadParameter.__base__
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train, evaluate and steer Free Transformers. "
    "Every command takes `--debug`, which shows the traceback of every error.",
)
app.command(cls=TrainCommand)(train)
for command in (sweep, evaluate, compare, generate, plan, watch, report, convert, export, serve):
    app.command()(command)
app.command(name="lm-eval")(lm_eval)
app.command()(tokenizer)
app.add_typer(reproduce, name="reproduce")


def main() -> None:
    """Entry point. Exit status: 0, 1 for a failure, 2 for bad input, 130 after Ctrl-C."""
    tolerate_any_encoding(sys.stdout, sys.stderr)
    debug = "--debug" in sys.argv
    arguments = [_with_home(argument) for argument in sys.argv[1:] if argument != "--debug"]
    with as_command(debug):
        status = app(arguments or ["--help"], standalone_mode=False) or 0
        if status == INTERRUPTED:
            _fail("interrupted; the same command resumes a training from its last checkpoint", INTERRUPTED)
        sys.exit(status)


@contextlib.contextmanager
def as_command(debug: bool = False) -> Iterator[None]:
    """
    Runs a command or a script: errors that a person can act on become one line on standard error, and `transformers`
    is quiet.

    These errors are `UserError`, wrong usage of the command line, messages of the operating system about a file or a
    disk, and a GPU without enough memory. Any other exception is a fault of this library and keeps its traceback.

    Args:
        debug: raise all errors but wrong usage.

    Raises:
        SystemExit: with status 2 for `InputError` and wrong usage, 1 for the other errors above. A training that was
            stopped by a signal raises it with status 128 + the signal's number.
    """
    if sys.modules.get("transformers"):  # a later import reads what `quiet` has set
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    try:
        yield
    except UsageError as error:
        _fail(f"{error.format_message()} (--help explains)", BAD_INPUT)
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            raise
        _fail(message, BAD_INPUT if isinstance(error, InputError) else FAILED)


def _message(error: Exception) -> str | None:
    """Returns the message for the user, None for an error that the user cannot act on."""
    if isinstance(error, UserError):
        return str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or str(error)
        return reason if error.filename is None else f"{error.filename}: {reason}"
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which may not be imported
        return f"out of memory; use a smaller batch ({error})"
    return None


def _with_home(argument: str) -> str:
    """Expands `~` in `--out=~/exports` as the shell does in `--out ~/exports`."""
    name, equals, value = argument.partition("=")
    if not equals or name not in PATH_OPTIONS:
        return argument
    return f"{name}={os.path.expanduser(value)}"  # noqa: PTH111 - Path raises for unknown users


def _fail(message: str, status: int) -> None:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    with contextlib.suppress(OSError):  # of a closed terminal
        print(f"free-transformer: error{rank}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
