"""README and documentation against the code: what they name exists. Their blocks run in test_pages.py."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer

import free_transformer
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


def script(name: str) -> ModuleType:
    """A script in docs/, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration", "commands"])
def test_generated_page_is_up_to_date(name):
    assert page_text(f"docs/{name}.md") == script(name).page(), "make docs generates it"


def test_every_page_is_in_the_navigation_once():
    named = re.findall(r"^ +- .*: ([\w-]+\.md)$", page_text("mkdocs.yml"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_versions_and_dates_agree():
    version, date = re.search(r"^## (\S+) \((\S+)\)", page_text("CHANGELOG.md"), re.MULTILINE).groups()
    citation = dict(re.findall(r"^([\w-]+): (.*)$", page_text("CITATION.cff"), re.MULTILINE))
    packaged = re.search(r'^version = "(\S+)"', page_text("pyproject.toml"), re.MULTILINE)[1]
    assert {version} == {free_transformer.__version__, packaged, citation["version"]}
    assert date == citation.get("date-released", "unreleased")
    assert f"version = {{{version}}}" in page_text("README.md")


def test_check_finds_broken_links_and_old_words(tmp_path, monkeypatch):
    check = script("check")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# One heading\n\n## `code` and [a link](there.md)\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[ok](there.md#one-heading) [ok](there.md#code-and-a-link) [ok](https://host/x) [no](gone.md)\n"
        "[no](there.md#gone)\n\n```\na judge's [link](block.md)\n```\n\n"
        "Two nats\na token, `voice`, the bits a plan carries, a tokenizer. The voices: to the bit.\n"
    )
    assert [fault.split(": ")[1] for fault in check.broken_links(page)] == ["gone.md", "there.md#gone"]
    assert [fault.split(": ")[1] for fault in check.old_words(page)] == ["'voices'", "'nats a token'", "'to the bit'"]


@pytest.mark.docs
def test_the_site_asks_nothing_of_another_host():
    asked = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\s(?:src|href)=["'](?:https?:)?//|url\(["']?https?:""")
    pages = [*(ROOT / "site").rglob("*.html"), *(ROOT / "site").rglob("*.css")]
    assert len(pages) > 20, "make docs writes them"
    assert [page.name for page in pages if asked.search(page.read_text(encoding="utf-8"))] == []
