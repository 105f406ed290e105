"""
Saves the model's code next to its weights, for users who have `transformers` but not this package
(`trust_remote_code=True`).

`config.json` names the code in `auto_map`, and a configuration with `auto_map` copies the code wherever it is saved.
Files in `model/` use only relative imports from this folder, so they also work inside a model folder.
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
    """Sets `auto_map` in the configuration if `wanted`, else removes it."""
    config.__dict__.pop("auto_map", None)
    if wanted:
        config.auto_map = dict(AUTO_MAP)


def code_files() -> list[Path]:
    """Returns the Python files of this folder."""
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")


def write_code(folder: Path) -> bool:
    """Copies the code to `folder`. If this would overwrite unrelated files, warns and returns False."""
    files = code_files()
    others = [
        file.name
        for file in files
        if (folder / file.name).exists() and not filecmp.cmp(file, folder / file.name, shallow=False)
    ]
    if others and not _names_code(folder):
        logger.warning(
            f"{folder}: the model's code would overwrite unrelated files ({', '.join(others)}) and was not saved, so "
            "loading this model needs free-transformer-lm; to save the code too, save into an empty folder"
        )
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return True


def _names_code(folder: Path) -> bool:
    """Whether the folder holds a saved model with code, possibly of an older version."""
    try:
        return "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
