"""README and documentation against the code: everything they name exists. Their blocks run in test_pages.py."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from free_transformer.cli.main import app
from pages import PAGES, ROOT, blocks_in, lines_of_shell


def page_text(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: Path) -> list[str]:
    """Lines of shell of a page, in blocks and in the text, comments left out."""
    lines = [line for block in blocks_in(page, "") for line in lines_of_shell(block)]
    spoken = re.findall(r"`((?:free-transformer|make) [^`]+)`", page_text(page))
    return [re.sub(r"\s+#.*", "", line).removeprefix(".venv/bin/") for line in [*lines, *spoken]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_is_named_exists(page):
    group = typer.main.get_command(app)
    known = group.commands
    for line in commands(page):
        words = shlex.split(line.replace("…", "").replace("'data", "data").replace("'", ""))
        if words[:1] != ["free-transformer"] or len(words) < 2 or not words[1].islower():
            continue
        if words[1].startswith("-"):
            assert any(words[1] in parameter.opts for parameter in group.params), line
            continue
        assert words[1] in known, line
        options = {name for parameter in known[words[1]].params for name in parameter.opts} | {"--help", "--debug"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_of_make_that_is_named_exists(page):
    targets = set(re.findall(r"^([a-z-]+):.*##", page_text("Makefile"), re.MULTILINE))
    named = {line.split()[1] for line in commands(page) if re.match(r"make [a-z]", line)}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_that_is_named_exists(page):
    named = re.findall(r"`((?:src|tests|benchmarks|examples|configs)/[\w/.-]+\.\w+)", page_text(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_test_that_shows_a_statement_is_there():
    """In the table of statements, a test is its file and its name without underscores; several are parted by `;`."""
    rows = [line for line in page_text("docs/faq-check.md").splitlines() if line.startswith("|")]
    parts = [part for row in rows for part in row.split("|")[2].split(";")]
    shown = [found.groups() for part in parts if (found := re.match(r" *`(tests/[\w/]+\.py)`: ([\w ]+)", part))]
    assert len(shown) > 60
    for file, name in shown:
        assert f"def test_{'_'.join(name.split())}(" in page_text(file), f"{file}: {name}"


def test_the_reference_of_settings_is_that_of_the_settings():
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert page_text("docs/configuration.md") == module.page(), "make docs creates it"


@pytest.mark.docs
def test_the_site_requests_nothing_from_another_host():
    asked = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\s(?:src|href)=["'](?:https?:)?//|url\(["']?https?:""")
    pages = [*(ROOT / "site").rglob("*.html"), *(ROOT / "site").rglob("*.css")]
    assert len(pages) > 20, "make docs creates them"
    assert [page.name for page in pages if asked.search(page.read_text(encoding="utf-8"))] == []
