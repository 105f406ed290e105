"""What commands print: one console for results, tables, samples and warnings."""

from collections.abc import Sequence

from rich.status import Status
from rich.table import Table

from free_transformer.reporting.console import stdout_console

console = stdout_console()


def print_line(text: str) -> None:
    """Prints one line, which the terminal wraps, so that paths in it can be copied."""
    console.print(text, soft_wrap=True)


def print_warning(text: str) -> None:
    console.print(f"warning: {text}", style="yellow")


def print_sample(title: str, text: str) -> None:
    """Prints a generated text under a line with its title."""
    console.rule(title, align="left")
    console.print(text, soft_wrap=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; nothing without rows."""
    if not rows:
        return
    table = Table()
    for title, *cells in zip(header, *rows, strict=True):  # a single word is never split or truncated
        table.add_column(title, no_wrap=not any(" " in text for text in [title, *cells]))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def status(text: str) -> Status:
    """Shows a text while a `with` block runs."""
    return console.status(text)
