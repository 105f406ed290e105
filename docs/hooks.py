"""Changes to pages of the site: figures in tables do not break, and changelog.md shows CHANGELOG.md."""

import re
from pathlib import Path
from typing import Any

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Shows CHANGELOG.md, whose links start at the root of the repository, in the place of changelog.md."""
    if page.file.src_uri != "changelog.md":
        return markdown
    return CHANGELOG.read_text(encoding="utf-8").replace("](docs/", "](")


def on_page_content(html: str, **_: object) -> str:
    """Keeps a figure and its error on one line of a table."""
    return re.sub(r"<td>.*?</td>", lambda cell: cell[0].replace(" ± ", "&nbsp;±&nbsp;"), html)
