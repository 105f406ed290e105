"""The model card, `README.md` of `model/`: what the model is, the run's own figures, and how to use it."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from free_transformer.files import write_text
from free_transformer.reporting.report import COMPARABLE, nll_method
from free_transformer.runs.monitor import VALIDATION_SAMPLES, Watcher
from free_transformer.settings.curriculum import stages_of

if TYPE_CHECKING:
    from free_transformer.runs.run import Run

CARD_FILE = "README.md"
MARK = "<!-- Written from the run's figures, and again when they change; without this line it stays as it is. -->"
BOUNDS = ("nll", "elbo")  # what may stand beside another model's, and so in the card's metadata
CONTROL = {  # of control.json: a number, or a number and its standard error; what is missing is left out
    "agreement": "texts under one random plan that are of its commonest kind",
    "agreement_baseline": "the same without a plan",
    "transfer": "texts under the plan of an example that are of its kind",
    "transfer_shuffled": "the same under the plans of other examples",
    "mutual_information": "bits that a plan tells of the kind of its text",
    "label_entropy": "the most that it could tell",
}


def write_model_card(run: "Run", folder: Path | None = None) -> None:
    """
    Writes the card of a run's model, but over nobody's own text: one without our mark stays.

    Args:
        folder: where to, default the run's `model/`; one that is to replace it inherits a text of the user's.
    """
    folder, card = folder or run.model_folder, run.model_folder / CARD_FILE
    if not (folder / "config.json").is_file():
        return
    text = card.read_text(encoding="utf-8") if card.is_file() else MARK
    if MARK in text:
        text = str(model_card(run, folder))
    elif folder == run.model_folder:
        return
    if os.access(folder, os.W_OK):  # a model may be there to be read only
        write_text(folder / CARD_FILE, text)


def model_card(run: "Run", folder: Path) -> ModelCard:
    """The card of the model in `folder`, by what the run's folder holds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name, figures, free = run.path.resolve().name, _figures(run), "latent_dim" in config
    pretrained = run.settings.model.pretrained
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["free-transformer", "latent-plan"] if free else ["llama"],
        base_model=pretrained if _is_on_the_hub(pretrained) else None,
        model_name=name,
        eval_results=_eval_results(figures) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}\n\n# {name}",
        _what_it_is(config, pretrained),
        _table(["", ""], [*_shape(config, folder), *_training(run)]),
        *_held_out(figures),
        *_compared(run),
        *_steering(run),
        _use(config) if free else _use_of_baseline(),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n", ignore_metadata_errors=True)


def _what_it_is(config: dict[str, Any], pretrained: str | None) -> str:
    start = f" It started from {_public(pretrained)}." if pretrained else ""
    trained = "Trained by [free-transformer-lm](https://pypi.org/project/free-transformer-lm/)."
    if "latent_dim" not in config:
        return f"A Llama without a plan, the baseline of a Free Transformer.{start} {trained}"
    span = config["plan_span"]
    lasts = "each text" if span == "sequence" else "each token" if span == 1 else f"every {span} tokens"
    return (
        f"A Free Transformer ([arXiv:2510.17558](https://arxiv.org/abs/2510.17558)): a Llama that draws a plan of "
        f"{config['latent_dim']} bits for {lasts} before it writes, and writes under it. An encoder reads the plan of "
        f"an existing text, so that new text can be written under the same.{start} {trained}"
    )


def _shape(config: dict[str, Any], folder: Path) -> list[list[str]]:
    parameters = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if not name.startswith("plan_prior.")]  # noqa: SIM118
            parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shape = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}, {heads} heads"
    shape += f", {key_heads} of keys and values" * (key_heads != heads)
    return [
        ["parameters", f"{parameters / 1e6:.2f} M"],
        ["shape", f"{shape}, {config['vocab_size']} tokens to choose from"],
    ]


def _training(run: "Run") -> list[list[str]]:
    training, step = run.settings.training, _model_step(run)
    steps = f"{step} steps"
    if isinstance(training.batch_size, int):
        rows = training.batch_size * training.gradient_accumulation_steps
        tokens = step * rows * training.seq_len
        steps += f" of {rows} rows of {training.seq_len} tokens, {tokens:,} with padding"
    sources = [source for stage in stages_of(run.settings) for source in stage.sources]
    return [["training text", _names(sources, quote="`")], ["training", steps]]


def _figures(run: "Run") -> SimpleNamespace:
    """Of `metrics.json` where it is of these weights, else of the validation that they had while they trained."""
    watcher = Watcher(run.settings, run.read_metrics())
    if (found := _current(run, run.evaluation_file)) is not None:
        return SimpleNamespace(**{"data": run.settings.data.validation, **found})
    step = _model_step(run)
    of_step = [line for line in run.read_metrics() if line["step"] == step and line["split"] == "validation"]
    values: dict[str, Any] = {**dict.fromkeys(COMPARABLE), "kl": None, "standard_errors": {}, "bytes_per_token": None}
    return SimpleNamespace(
        **{**values, **(of_step[-1] if of_step else {})},
        data=run.settings.data.validation,
        method="validation",
        warning=watcher.collapse.get("warning"),
    )


def _held_out(figures: SimpleNamespace) -> list[str]:
    """Every figure under its name, with what it may be compared with."""
    names = [name for name in ("nll", "elbo", "prior", "reconstruction", "gap") if getattr(figures, name) is not None]
    if not names:
        return []
    rows = []
    for name in names:
        meaning, comparison = COMPARABLE[name]
        value, error = getattr(figures, name), figures.standard_errors.get(name)
        if name == "nll":
            meaning = f"{meaning}: {_nll_method(figures)}"
        cells = [_number(value, error)]
        if figures.bytes_per_token:
            cells.append(_number(value / figures.bytes_per_token, error and error / figures.bytes_per_token))
        rows.append([name, *cells, meaning, comparison])
    units = ["nats per token", "nats per byte"][: len(rows[0]) - 3]
    parts = [
        f"## On held-out text ({_names(figures.data, '`')})",
        _table(["", *units, "what it is", "beside a Llama's loss"], rows),
    ]
    if figures.kl is not None:
        kl = _number(figures.kl, figures.standard_errors.get("kl"))
        parts.append(
            f"A plan spends {kl} bits (KL of posterior and prior). The reconstruction is no likelihood: the encoder "
            "has read the text that is predicted."
        )
    if figures.warning:  # what is wrong; what to try is for who trains
        parts.append(f"**Warning:** {figures.warning.split(' Try:')[0]}")
    return parts


def _compared(run: "Run") -> list[str]:
    found = _current(run, run.comparison_file)
    if found is None:
        return []
    difference = _number(found["difference"], found["standard_error"], sign="+")
    return [
        f"Beside its baseline, a Llama without a plan: nll {found['nll']:.4f} against {found['baseline_nll']:.4f} nats "
        f"per token, a difference of {difference} over texts, of one run each (below 0: better than the Llama); by the "
        f"pessimistic elbo {found['elbo_difference']:+.4f}."
    ]


def _steering(run: "Run") -> list[str]:
    found = _current(run, run.control_file) or {}
    rows = []
    for name, meaning in CONTROL.items():
        if found.get(name) is not None:
            value, error = found[name] if isinstance(found[name], list) else (found[name], None)
            rows.append([name.replace("_", " "), _number(value, error), meaning])
    return ["## Steering", _table(["", "", "what it is"], rows)] if rows else []


def _use(config: dict[str, Any]) -> str:
    return f"""## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)

prompt = tokenizer("The", return_tensors="pt").input_ids
written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=True)
print(tokenizer.decode(written[0], skip_special_tokens=True))
```

`trust_remote_code=True` runs the Python files beside the weights, those of free-transformer-lm (MIT licence). With
`pip install free-transformer-lm` and `import free_transformer` the installed package is used, and not asked for.

Under a plan of {config["latent_dim"]} bits, read from an example or drawn; plans that are not given are drawn:

```python
example = tokenizer("A text like the one that is wanted.", return_tensors="pt").input_ids
plan = model.infer_plan(example) > 0  # (1, plans, {config["latent_dim"]})
at_random = model.sample_plan(1, 1)  # one more
written = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), plan=plan, max_new_tokens=100, do_sample=True
)
```"""


def _use_of_baseline() -> str:
    return """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
```"""


def _eval_results(figures: SimpleNamespace) -> list[EvalResult]:
    """What may be compared; the reconstruction is in the text alone, so that no list of models ranks by it."""
    meanings = {"nll": f"negative log-likelihood ({_nll_method(figures)})", "elbo": COMPARABLE["elbo"][0]}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=_names(figures.data),
            metric_type=name,
            metric_name=f"{meanings[name]}, nats per token",
            metric_value=round(getattr(figures, name), 4),
        )
        for name in BOUNDS
        if getattr(figures, name) is not None
    ]


def _nll_method(figures: SimpleNamespace) -> str:
    if figures.elbo is None:  # a baseline's
        return "exact"
    if figures.method == "validation":
        return f"importance-weighted bound, {VALIDATION_SAMPLES} plans"
    return nll_method(figures)  # type: ignore[arg-type]


def _model_step(run: "Run") -> int:
    """The step whose weights `model/` has."""
    return run.model.get("step") or Watcher(run.settings, run.read_metrics()).step


def _current(run: "Run", file: Path) -> dict[str, Any] | None:
    """What a file of results holds, unless it was measured on an earlier model."""
    results = run.read_results(file)
    return results if results is not None and run.is_current(file, results) else None


def _is_on_the_hub(name: str | None) -> bool:
    return bool(name) and not Path(str(name)).exists() and not Path(str(name)).is_absolute()


def _public(source: str) -> str:
    """The last part of a path: where a file lies on somebody's machine is nobody else's business."""
    return source if _is_on_the_hub(source) and source.count("/") <= 1 else Path(source).name


def _names(sources: Iterable[str], quote: str = "") -> str:
    return ", ".join(dict.fromkeys(f"{quote}{Path(source).name}{quote}" for source in sources)) or "-"


def _number(value: float, error: float | None = None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error else "")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
