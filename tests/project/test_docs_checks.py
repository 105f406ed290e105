"""The generated page of commands, the navigation of the site, versions, and the script that checks links and words."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import free_transformer
from pages import ROOT


def page_text(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    """A script in docs/, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_commands_is_up_to_date():
    assert page_text("docs/commands.md") == script("commands").page(), "make docs generates it"


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


def test_changelog_page_has_links_relative_to_the_site():
    hooks, page = script("hooks"), type("Page", (), {"file": type("File", (), {"src_uri": "changelog.md"})})
    shown = hooks.on_page_markdown("stub", page=page)
    linked = re.findall(r"\]\(([\w./-]+\.md)", shown)
    assert linked and all((ROOT / "docs" / name).is_file() for name in linked)


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
