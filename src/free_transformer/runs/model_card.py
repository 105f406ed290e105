"""The model card, `model/README.md`: a description of the model, the figures of its run, and how to use it."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from free_transformer.files import write_text
from free_transformer.reporting.report import COMPARABLE, nll_method
from free_transformer.reporting.table import Table
from free_transformer.runs.lines import JsonObject
from free_transformer.runs.monitor import VALIDATION_SAMPLES, Monitor
from free_transformer.settings.curriculum import stages_of

if TYPE_CHECKING:
    from free_transformer.runs.run import Run

CARD_FILE = "README.md"
MARK = "<!-- Written from the run's figures, and again when they change; without this line it stays as it is. -->"
BOUNDS = ("nll", "elbo")  # comparable with other models, and therefore part of the metadata
CONTROL = {  # in control.json: a number, or a number and its standard error
    "agreement": "texts under one random plan with its most common label",
    "agreement_baseline": "the same without a plan",
    "transfer": "texts under an example's plan with the example's label",
    "transfer_shuffled": "the same under the plans of other examples",
    "mutual_information": "information of a plan about the label of its text, in bits",
    "label_entropy": "maximum of the mutual information, in bits",
}


@dataclass
class HeldOutFigures:
    """
    Figures of the model on held-out text, in nats per token unless noted; None if unknown.

    Attributes:
        kl: KL in bits per plan.
        data: sources of the text.
        method, num_samples, plan_prior: how `nll` was computed, as in `Likelihood`.
        warning: reason why the plan is not used, None if it is used.
    """

    data: list[str]
    method: str
    num_samples: int
    plan_prior: str = "uniform"
    nll: float | None = None
    elbo: float | None = None
    prior: float | None = None
    reconstruction: float | None = None
    gap: float | None = None
    kl: float | None = None
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    bytes_per_token: float | None = None
    warning: str | None = None

    @classmethod
    def of(cls, values: JsonObject, **known: object) -> "HeldOutFigures":
        """Builds the figures from a line of metrics or from `metrics.json`, ignoring other keys."""
        return cls(**{name: value for name, value in {**known, **values}.items() if name in cls.__dataclass_fields__})

    def value(self, name: str) -> float | None:
        """Returns the figure with this name in `COMPARABLE`."""
        return getattr(self, name)

    @property
    def nll_method(self) -> str:
        """Description of how `nll` was computed."""
        return "exact" if self.elbo is None else nll_method(self)  # a baseline has no elbo


def write_model_card(run: "Run", folder: Path | None = None) -> None:
    """
    Writes the card of a run's model. A card without `MARK` was written by the user and is not replaced.

    Args:
        folder: folder of the model, default the run's `model/`. Any other folder is about to replace `model/`, so a
            card written by the user is copied to it.
    """
    folder, card = folder or run.model_folder, run.model_folder / CARD_FILE
    if not (folder / "config.json").is_file():
        return
    text = card.read_text(encoding="utf-8") if card.is_file() else MARK
    if MARK in text:
        text = str(model_card(run, folder))
    elif folder == run.model_folder:
        return
    if os.access(folder, os.W_OK):  # the model may be read-only
        write_text(folder / CARD_FILE, text)


def model_card(run: "Run", folder: Path) -> ModelCard:
    """Builds the card of the model in `folder` from the files of the run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name, figures, free = run.name, _figures(run), "latent_dim" in config
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
        Table(["", ""], [*_shape(config, folder), *_training(run)]).to_markdown(),
        *_held_out(figures),
        *_compared(run),
        *_steering(run),
        _use(config) if free else _use_of_baseline(),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n", ignore_metadata_errors=True)


def _what_it_is(config: JsonObject, pretrained: str | None) -> str:
    start = f" It started from {_public(pretrained)}." if pretrained else ""
    trained = "Trained by [free-transformer-lm](https://pypi.org/project/free-transformer-lm/)."
    if "latent_dim" not in config:
        return f"A Llama without a plan, the baseline of a Free Transformer.{start} {trained}"
    span = config["plan_span"]
    lasts = "each text" if span == "sequence" else "each token" if span == 1 else f"every {span} tokens"
    return (
        f"A Free Transformer ([arXiv:2510.17558](https://arxiv.org/abs/2510.17558)): a Llama that samples a plan of "
        f"{config['latent_dim']} bits for {lasts} and generates text conditioned on it. An encoder infers the plan of "
        f"an existing text, so that new text can be generated with the same plan.{start} {trained}"
    )


def count_parameters(folder: Path) -> int:
    """Returns the number of parameters of the model in a folder, read from its file headers."""
    parameters = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if not name.startswith("plan_prior.")]  # noqa: SIM118
            parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return parameters


def _shape(config: JsonObject, folder: Path) -> list[list[str]]:
    parameters = count_parameters(folder)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shape = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}, {heads} heads"
    shape += f", {key_heads} of keys and values" * (key_heads != heads)
    return [
        ["parameters", f"{parameters / 1e6:.2f} M"],
        ["shape", f"{shape}, {config['vocab_size']} tokens in the vocabulary"],
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


def _figures(run: "Run") -> HeldOutFigures:
    """Reads `metrics.json` if it was measured on these weights, otherwise their validation during training."""
    data = run.settings.data.validation
    if (found := run.current_results(run.evaluation_file)) is not None:
        return HeldOutFigures.of(found, data=data, method="exact", num_samples=1)
    step = _model_step(run)
    of_step = [line for line in run.read_metrics() if line["step"] == step and line["split"] == "validation"]
    warning = Monitor(run.settings, run.read_metrics()).history.collapse.get("warning")
    known = {"data": data, "method": "importance", "num_samples": VALIDATION_SAMPLES, "warning": warning}
    return HeldOutFigures.of(of_step[-1] if of_step else {}, **known)


def _held_out(figures: HeldOutFigures) -> list[str]:
    """Formats every figure, with its meaning and what it can be compared with."""
    rows = []
    for name in ("nll", "elbo", "prior", "reconstruction", "gap"):
        meaning, comparison = COMPARABLE[name]
        value, error = figures.value(name), figures.standard_errors.get(name)
        if value is None:
            continue
        if name == "nll":
            meaning = f"{meaning}: {figures.nll_method}"
        cells = [_number(value, error)]
        if figures.bytes_per_token:
            cells.append(_number(value / figures.bytes_per_token, error and error / figures.bytes_per_token))
        rows.append([name, *cells, meaning, comparison])
    if not rows:
        return []
    units = ["nats per token", "nats per byte"] if figures.bytes_per_token else ["nats per token"]
    parts = [
        f"## On held-out text ({_names(figures.data, '`')})",
        Table(["", *units, "what it is", "compared with a Llama's loss"], rows).to_markdown(),
    ]
    if figures.kl is not None:
        kl = _number(figures.kl, figures.standard_errors.get("kl"))
        parts.append(
            f"A plan uses {kl} bits (KL of posterior and prior). The reconstruction is not a likelihood: the encoder "
            "has read the predicted text."
        )
    if figures.warning:  # without the advice, which concerns training
        parts.append(f"**Warning:** {figures.warning.split(' Try:')[0]}")
    return parts


def _compared(run: "Run") -> list[str]:
    found = run.current_results(run.comparison_file)
    if found is None:
        return []
    difference = _number(found["difference"], found["standard_error"], sign="+")
    return [
        f"Compared with its baseline, a Llama without a plan: nll {found['nll']:.4f} against "
        f"{found['baseline_nll']:.4f} nats per token, a difference of {difference} over texts, one run each (negative: "
        f"better than the Llama). With the pessimistic elbo the difference is {found['elbo_difference']:+.4f}."
    ]


def _steering(run: "Run") -> list[str]:
    found = run.current_results(run.control_file) or {}
    rows = []
    for name, meaning in CONTROL.items():
        if found.get(name) is not None:
            value, error = found[name] if isinstance(found[name], list) else (found[name], None)
            rows.append([name.replace("_", " "), _number(value, error), meaning])
    return ["## Steering", Table(["", "", "what it is"], rows).to_markdown()] if rows else []


def _use(config: JsonObject) -> str:
    return f"""## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)

prompt = tokenizer("The", return_tensors="pt").input_ids
generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=True)
print(tokenizer.decode(generated[0], skip_special_tokens=True))
```

`trust_remote_code=True` runs the Python files in this folder, which are those of free-transformer-lm (MIT license).
With `pip install free-transformer-lm` and `import free_transformer` the installed package is used instead.

Generate with a plan of {config["latent_dim"]} bits, inferred from an example or sampled. Plans that are not given are
sampled:

```python
example = tokenizer("A text in the style to generate.", return_tensors="pt").input_ids
plan = model.infer_plan(example) > 0  # (1, plans, {config["latent_dim"]})
random_plan = model.sample_plan(1, 1)
generated = model.generate(
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


def _eval_results(figures: HeldOutFigures) -> list[EvalResult]:
    """Returns the comparable figures. Leaves out the reconstruction, so that no leaderboard ranks by it."""
    meanings = {"nll": f"negative log-likelihood ({figures.nll_method})", "elbo": COMPARABLE["elbo"][0]}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=_names(figures.data),
            metric_type=name,
            metric_name=f"{meanings[name]}, nats per token",
            metric_value=round(value, 4),
        )
        for name in BOUNDS
        if (value := figures.value(name)) is not None
    ]


def _model_step(run: "Run") -> int:
    """Returns the step of the weights in `model/`."""
    return run.model.get("step") or Monitor(run.settings, run.read_metrics()).step


def _is_on_the_hub(name: str | None) -> bool:
    return bool(name) and not Path(str(name)).exists() and not Path(str(name)).is_absolute()


def _public(source: str) -> str:
    """Returns a name on the Hub unchanged, and only the last part of a path, so as not to publish local paths."""
    return source if _is_on_the_hub(source) and source.count("/") <= 1 else Path(source).name


def _names(sources: Iterable[str], quote: str = "") -> str:
    return ", ".join(dict.fromkeys(f"{quote}{Path(source).name}{quote}" for source in sources)) or "-"


def _number(value: float, error: float | None = None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error else "")
