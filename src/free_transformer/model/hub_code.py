"""
Saves the model's code next to its weights, for users who have `transformers` but not this package
(`trust_remote_code=True`).

`config.json` names the code in `auto_map`, and a configuration that does brings it along wherever it is saved. What
`model` imports of this package it imports relatively, so that the files also find each other in a model's folder.
"""

import filecmp
import json
import logging
import shutil
from pathlib import Path

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Both from one file: `transformers` copies each named file and its imports to a separate place.
AUTO_MAP = {"AutoConfig": "modeling.FreeTransformerConfig", "AutoModelForCausalLM": "modeling.FreeTransformer"}


def name_code(config: PreTrainedConfig, wanted: bool) -> None:
    """Lets the configuration name the code of the model, or no code."""
    config.__dict__.pop("auto_map", None)
    if wanted:
        config.auto_map = dict(AUTO_MAP)


def code_files() -> list[Path]:
    """The files of this folder."""
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")


def write_code(folder: Path) -> bool:
    """Copies the code, unless it would overwrite files that are not its own: then it warns, and returns False."""
    files = code_files()
    others = [
        file.name
        for file in files
        if (folder / file.name).exists() and not filecmp.cmp(file, folder / file.name, shallow=False)
    ]
    if others and not _names_code(folder):
        logger.warning(
            f"{folder}: {', '.join(others)} belong to something else, so the code of the model is left out "
            "and loading it needs free-transformer-lm; save into an empty folder"
        )
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return True


def _names_code(folder: Path) -> bool:
    """Whether the Python files in the folder are those of a model, such as an older version's."""
    try:
        return "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
