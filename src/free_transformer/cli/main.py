"""
The command line. Each command parses its options, calls the library and prints the result.

Commands import heavy modules inside their functions, so that `--help` is fast and `serve --onnx` runs without torch.
"""

import os
import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from free_transformer import (
    __version__,
    quiet,  # noqa: F401  # before the imports that it quiets
)
from free_transformer.cli.compare import compare
from free_transformer.cli.convert import convert
from free_transformer.cli.evaluate import evaluate
from free_transformer.cli.exit_status import INTERRUPTED, as_command, fail
from free_transformer.cli.explore import explore
from free_transformer.cli.export import export
from free_transformer.cli.generate import generate
from free_transformer.cli.lm_eval import lm_eval
from free_transformer.cli.options import PATH_OPTIONS
from free_transformer.cli.output import print_line
from free_transformer.cli.plan import plan
from free_transformer.cli.report import report
from free_transformer.cli.reproduce import reproduce
from free_transformer.cli.serve import serve
from free_transformer.cli.sweep import sweep
from free_transformer.cli.tokenizer import tokenizer
from free_transformer.cli.train import train
from free_transformer.cli.train_help import TrainCommand
from free_transformer.cli.watch import watch
from free_transformer.reporting.console import tolerate_any_encoding

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(asked: bool) -> None:
    if asked:
        print_line(f"free-transformer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """
    Train, evaluate and steer Free Transformers.

    `free-transformer COMMAND --help` explains a command. Every command accepts `--debug`, which shows the traceback of
    every error.
    """


app.command(cls=TrainCommand)(train)
for command in (sweep, evaluate, compare, generate, plan, watch, report, convert, export, serve, explore):
    app.command()(command)
app.command(name="lm-eval")(lm_eval)
app.command()(tokenizer)
app.add_typer(reproduce, name="reproduce")


RENAMED_OPTIONS = {name: {"--num-samples": "--num-plans"} for name in ("evaluate", "compare")}  # old names still work


def main() -> None:
    """Entry point. Exit status: 0, 1 for a failure, 2 for bad input, 130 after Ctrl-C."""
    tolerate_any_encoding(sys.stdout, sys.stderr)
    debug = "--debug" in sys.argv
    arguments = [_with_home(argument) for argument in sys.argv[1:] if argument != "--debug"]
    arguments = [_with_new_name(argument, RENAMED_OPTIONS.get(arguments[0], {})) for argument in arguments]
    with as_command(debug):
        status = app(arguments or ["--help"], prog_name="free-transformer", standalone_mode=False) or 0
        if status == INTERRUPTED:
            fail("interrupted; run the same command again to resume training from the last checkpoint", INTERRUPTED)
        sys.exit(status)


def _with_new_name(argument: str, new_names: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return f"{new_names.get(name, name)}{equals}{value}"


def _with_home(argument: str) -> str:
    """Expands `~` in `--out=~/exports` as the shell does in `--out ~/exports`."""
    name, equals, value = argument.partition("=")
    if not equals or name not in PATH_OPTIONS:
        return argument
    return f"{name}={os.path.expanduser(value)}"  # noqa: PTH111 - Path raises for unknown users
