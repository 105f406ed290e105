"""Writes docs/configuration.md from the settings themselves; `make docs` runs it, and a test compares."""

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from free_transformer import quiet  # noqa: F401
from free_transformer.config import FreeTransformerConfig
from free_transformer.training.settings import DECIDED_BY, Section, Settings, StageSettings

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """<!-- written by docs/configuration.py: change the settings' own descriptions -->
# Settings

A run reads a YAML file with these sections, and `section.name=value` on the command line changes any of them:

```
free-transformer train configs/free_transformer.yaml training.learning_rate=1e-3 run_dir=runs/mine
```

An unknown name is refused and the nearest known one named. What a run used, every default written out, stands in its
`config.yaml`. The files in `configs/` are good starts.
"""
OF_THE_MODEL = "The fields of `LlamaConfig` are settings of `model` too, as in `model.rms_norm_eps=1e-6`. Short names: "


def page() -> str:
    parts = [HEAD, table("run", {"run_dir": Settings.model_fields["run_dir"]})]
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            parts.append(table(name, section.model_fields))
            if name == "model":
                parts += [further({*section.model_fields, *DECIDED_BY, "encoder_class"}), OF_THE_MODEL + short_names()]
            if name == "training":
                parts.append(table("training.stages", StageSettings.model_fields))
    return "\n".join(parts)


def table(name: str, fields: dict[str, Any]) -> str:
    rows = ((key, field.get_default(call_default_factory=True), field.description) for key, field in fields.items())
    return rows_of(name, rows)


def further(known: set[str]) -> str:
    """What the model's configuration has beyond the section `model`, described where it is defined."""
    described = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", attributes(), re.DOTALL | re.MULTILINE)
    rows = ((name, getattr(FreeTransformerConfig, name), text) for name, text in described if name not in known)
    return rows_of("model, further", rows)


def attributes() -> str:
    return inspect.cleandoc(FreeTransformerConfig.__doc__ or "").split("Attributes:\n")[1].split("\n\n")[0]


def rows_of(name: str, rows: Iterable[tuple[str, Any, str | None]]) -> str:
    lines = [f"| `{key}` | {shown(default)} | {escaped(text)} |" for key, default, text in rows]
    return "\n".join([f"## {name}\n", "| setting | default | meaning |", "|---|---|---|", *lines, ""])


def short_names() -> str:
    pairs = [f"`{short}` (`{full}`)" for short, full in FreeTransformerConfig.attribute_map.items()]
    return ", ".join(pairs) + ".\n"


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, BaseModel | list | dict) and not value:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def escaped(text: str | None) -> str:
    return " ".join((text or "").replace("|", r"\|").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
