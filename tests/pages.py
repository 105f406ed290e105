"""Blocks of README and documentation, for tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str | Path) -> list[tuple[str, str]]:
    """The fenced blocks, each with its language, "" for commands; `page` from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def blocks_in(page: str | Path, language: str) -> list[str]:
    return [block for each, block in blocks(page) if each == language]


def lines_of_shell(block: str) -> list[str]:
    """Its commands, continued ones joined."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line]
