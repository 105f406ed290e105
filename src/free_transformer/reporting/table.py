"""A table of text, for a terminal, an HTML page or a Markdown file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        header: titles of the columns.
        rows: cells of each row, as many as there are titles.
        caption: description of the table; may be empty.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def columns(self, *indices: int) -> "Table":
        """Returns the table with only these columns."""
        header = [self.header[index] for index in indices]
        return replace(self, header=header, rows=[[row[index] for index in indices] for row in self.rows])

    def print(self, console: Console) -> None:
        """Prints the table; a table without rows prints nothing."""
        if self.rows:
            console.print(self.to_rich())

    def to_rich(self) -> RichTable:
        table = RichTable(caption=self.caption or None, caption_justify="left")
        for title, *cells in zip(
            self.header, *self.rows, strict=True
        ):  # otherwise rich breaks or truncates single words
            table.add_column(title, no_wrap=not any(" " in text for text in [title, *cells]))
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<tr>{head}</tr>{body}</table>"

    def to_markdown(self) -> str:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [f"| {' | '.join(line)} |" for line in (self.header, ["---"] * len(self.header), *rows)]
        return "\n".join([*([self.caption, ""] if self.caption else []), *lines])


def _html_cell(text: str) -> str:
    """Escapes a cell, and keeps a value and its error on one line."""
    return html.escape(text).replace(" ± ", "\u00a0±\u00a0")
