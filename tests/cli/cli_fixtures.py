"""Fixtures of the tests of the command line: `from cli_fixtures import *` in a test file."""

import shutil
import sys
from pathlib import Path

import pytest
from cli_cases import KINDS, TEXT, Outcome, tiny_settings

from free_transformer.cli.main import main
from free_transformer.files import write_text
from free_transformer.training import train

__all__ = ["command", "config", "run", "runs", "wide_terminal"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `free-transformer ...` in this process: exit status and output."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["free-transformer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A free run and a baseline of twenty steps, `free_bits` high enough for a posterior that spends bits."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text.txt", TEXT)
    return {kind: train(tiny_settings(folder, kind), quiet=True).path for kind in KINDS}


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the free run, for a test that changes it."""
    return Path(shutil.copytree(runs["free"], tmp_path / "copy", ignore=shutil.ignore_patterns("metrics.json")))


@pytest.fixture
def config(tmp_path) -> Path:
    """A file of settings for a run in `tmp_path / "free"`."""
    write_text(tmp_path / "text.txt", TEXT)
    settings = tiny_settings(tmp_path, "free")
    write_text(tmp_path / "config.yaml", settings.to_yaml())
    return tmp_path / "config.yaml"
