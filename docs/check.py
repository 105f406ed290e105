"""Checks links and wording of the documentation: `python docs/check.py`, part of `make quality`. Prints each fault."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from proselint.checks import __register__
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).parents[1]
PAGES = ["*.md", "docs/*.md", "models/*/README.md"]
CODE = ["src/**/*.py", "examples/**/*.py", "benchmarks/**/*.py", "docs/*.py", "configs/*.yaml", "Makefile"]
UNITS = "nats?|bits?|bytes?|plans?|tokens?|FLOPs?|operations|MB|GB|rows"
PER = "token|byte|plan|text|string|window|sequence|second|step|seed|GPU|process|weight|document|bit|row|sample"
GLOSSARY = {  # words to avoid, and what to write instead
    r"judg(e|es|ed|ing)": "evaluate (verb), classifier (noun)",
    r"voices?": "source or style",
    rf"({UNITS}) an? ({PER})(?! (carries|has|spends|needs|may|can|that|is|costs|takes)\b)": "per: nats per token",
    r"fair coins?": "uniform prior",
    r"to the bit": "bit-for-bit",
    r"bare products?": "raw matmul",
    r"plan of zeros": "R = 0, for example plan_strength=0 (code 0 has a row of the codebook)",
}
UNCHECKED = {"typography": False, "dates_times": False, "weasel_words": False}  # of proselint
NOT_PROSE = re.compile(r"^```.*?^```|`[^`\n]*`|\]\([^)\n]*\)|https?://\S+|<!--.*?-->", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def main() -> None:
    pages, code = files(PAGES), files(CODE)
    faults = [fault for page in pages for fault in broken_links(page)]
    faults += [fault for file in [*pages, *code] if file != Path(__file__) for fault in old_words(file)]
    CheckRegistry().register_many(__register__)
    faults += [fault for page in pages for fault in style_faults(page)]
    print("\n".join(faults) or f"{len(pages)} pages and {len(code)} files: no faults in links and words")
    sys.exit(bool(faults))


def files(patterns: list[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in ROOT.glob(pattern))


def old_words(file: Path) -> Iterator[str]:
    """One line for each word of the glossary, outside blocks and `code` of pages."""
    text = prose_of(file) if file.suffix == ".md" else file.read_text(encoding="utf-8")
    for words, instead in GLOSSARY.items():
        for found in re.finditer(rf"\b{words}\b".replace(" ", r"\s+"), text, re.IGNORECASE):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{file.relative_to(ROOT)}:{line}: {' '.join(found[0].split())!r}: write {instead}"


def style_faults(page: Path) -> Iterator[str]:
    """One line for each fault that proselint finds in the prose of a page."""
    config = {**DEFAULT, "checks": {**DEFAULT["checks"], **UNCHECKED}}
    text = re.sub(r"^ *$", "#", re.sub(r"\d", "#", prose_of(page, "#")), flags=re.MULTILINE)
    for result, (line, _) in LintFile(page, text).lint(config):
        yield f"{page.relative_to(ROOT)}:{line}: {result.message} ({result.check_path})"


def prose_of(page: Path, instead: str = " ") -> str:
    """The text of a page with other characters in place of code, links' targets and comments."""
    return NOT_PROSE.sub(lambda found: re.sub(r"[^\n]", instead, found[0]), page.read_text(encoding="utf-8"))


def broken_links(page: Path) -> Iterator[str]:
    """One line for each link to a file, image or heading that does not exist."""
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists():
            yield f"{page.relative_to(ROOT)}: {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{page.relative_to(ROOT)}: {target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as on the site and as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    bare = [re.sub(r"[^\w\s-]", "", heading).strip() for heading in plain]
    return {re.sub(r"[-\s]+", "-", heading) for heading in bare} | {heading.replace(" ", "-") for heading in bare}


if __name__ == "__main__":
    main()
