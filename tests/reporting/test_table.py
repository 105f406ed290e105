"""A table in a terminal, on a page and in Markdown."""

import io

import pytest
from rich.console import Console

from free_transformer.reporting.report import Report
from free_transformer.reporting.table import Table

TABLE = Table(["name", "value"], [["a<b", "1.00 ± 0.01"], ["c|d", "2"]], "What it <shows>")


def printed(table: Table) -> str:
    console = Console(width=60, file=io.StringIO())
    table.print(console)
    return console.file.getvalue()


def test_terminal_has_every_cell_and_the_caption():
    shown = printed(TABLE)
    assert all(text in shown for text in ("name", "value", "a<b", "1.00 ± 0.01", "c|d", "What it <shows>"))
    assert printed(Table(["name"], [])) == ""


def test_html_escapes_and_keeps_a_value_with_its_error_on_one_line():
    page = TABLE.to_html()
    assert "<td>a&lt;b</td><td>1.00\u00a0±\u00a00.01</td>" in page
    assert "<caption>What it &lt;shows&gt;</caption>" in page
    assert "<caption>" not in Table(["name"], [["a"]]).to_html()


def test_markdown_escapes_bars():
    assert TABLE.to_markdown().splitlines() == [
        *("What it <shows>", "", "| name | value |", "| --- | --- |", "| a<b | 1.00 ± 0.01 |", "| c\\|d | 2 |"),
    ]


def test_columns_selects_in_order():
    assert TABLE.columns(1) == Table(["value"], [["1.00 ± 0.01"], ["2"]], TABLE.caption)


@pytest.mark.parametrize("add", ["heading", "paragraph", "warning"])
def test_page_escapes_text(tmp_path, add):
    report = Report("<title>")
    getattr(report, add)("<script>&")
    report.samples([("<name>", "<text>\n  indented")], lines=True)
    report.table(TABLE)
    report.write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;&amp;" in page and "<h1>&lt;title&gt;</h1>" in page
    assert "<pre>&lt;text&gt;\n  indented</pre>" in page and TABLE.to_html() in page
    assert page.startswith("<!doctype html>") and page.endswith("</body></html>\n")
