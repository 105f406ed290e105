"""README and documentation against the code: what they name exists, and complete examples run."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from free_transformer.cli import app
from pages import ROOT, blocks

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMPLETE = ("README.md", "docs/index.md", "docs/contributing.md")  # pages whose Python blocks need nothing else


def commands(page: Path) -> list[str]:
    """Lines of shell of a page, continued ones joined and comments left out."""
    text = "\n".join(blocks(page)).replace("\\\n", " ")
    spoken = re.findall(r"`((?:free-transformer|make) [^`]+)`", page.read_text(encoding="utf-8"))
    return [re.sub(r"\s+#.*", "", line).removeprefix(".venv/bin/") for line in [*text.splitlines(), *spoken]]


EXAMPLES = [(page, number) for page in COMPLETE for number in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), EXAMPLES)
def test_a_complete_example_runs(page, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page, "python")[number], f"{page}[{number}]", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_is_named_exists(page):
    known = typer.main.get_command(app).commands
    for line in commands(page):
        words = shlex.split(line.replace("…", "").replace("'data", "data").replace("'", ""))
        if words[:1] != ["free-transformer"] or len(words) < 2 or not words[1].islower():
            continue
        assert words[1] in known, line
        options = {name for parameter in known[words[1]].params for name in parameter.opts} | {"--help", "--debug"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_of_make_that_is_named_exists(page):
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {line.split()[1] for line in commands(page) if re.match(r"make [a-z]", line)}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_that_is_named_exists(page):
    named = re.findall(r"`((?:src|tests|benchmarks|examples|configs)/[\w/.-]+\.\w+)", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_reference_of_settings_is_that_of_the_settings():
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == module.page(), "make docs writes it"
