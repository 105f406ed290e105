"""Output of commands: results, tables and samples on standard output, warnings on standard error."""

from typing import TYPE_CHECKING

from rich.status import Status

from free_transformer.reporting.console import printable, stderr_console, stdout_console
from free_transformer.reporting.table import Table

if TYPE_CHECKING:
    from free_transformer.runs.verdict import Verdict

console = stdout_console()


def print_line(text: str) -> None:
    """Prints one line without hard wrapping, so that paths in it can be copied."""
    console.print(text, soft_wrap=True)


def print_warning(text: str) -> None:
    """Prints one line to standard error, so that results can be redirected to a file."""
    stderr_console().print(f"warning: {text}", style="yellow", soft_wrap=True)


def print_verdict(verdict: "Verdict") -> None:
    """Prints the verdict on a run, and what to do next."""
    style = {"good": "green", "problem": "yellow"}.get(verdict.tone)
    first, *follow = verdict.lines
    console.print(first, style=style, soft_wrap=True)
    for line in follow:
        print_line(line)


def print_sample(title: str, text: str) -> None:
    """Prints a generated text under a title. Control characters except line breaks and tabs are escaped."""
    console.rule(title, align="left")
    console.print(printable(text), soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table, unless it has no rows."""
    table.print(console)


def status(text: str) -> Status:
    """Shows a text while a `with` block runs."""
    return console.status(text)
