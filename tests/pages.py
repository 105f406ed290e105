"""What the documentation holds, for whoever checks it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str | Path, language: str = "") -> list[str]:
    """The fenced blocks of a language, those without one by default; `page` from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
