"""
Measures what stratified plans add, on runs of the demo (`examples/three_styles`).

- `modes`: number of texts until all of eight equally common modes appear, by simulation.
- `styles`: different sources among k texts, for k = 1 … 64, of stratified and independent plans and of the baseline.
- `curves`: diversity and negative log-likelihood (NLL) under an independent model for several temperatures, and the
  diversity of both models at equal NLL.

Each saves a JSON and a Markdown file in `--out`. `styles` and `curves` need the runs of `make demo`, and `curves` a
third one (`make diversity`).
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "three_styles"))

from classifier import StyleClassifier  # noqa: E402
from demo import read_rows, train_classifier  # noqa: E402

from free_transformer.evaluation.diversity import distinct_n, label_entropy, reference_nll, self_bleu  # noqa: E402
from free_transformer.files import write_text  # noqa: E402
from free_transformer.model.modeling import FreeTransformer  # noqa: E402
from free_transformer.model.stratified import chance_of_prior, numbers_per_set, stratify  # noqa: E402
from free_transformer.reporting.table import Table  # noqa: E402
from free_transformer.training import Run  # noqa: E402

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PART = 16  # texts per group, whose diversity is measured
BATCH = 128

Out = Annotated[Path, typer.Option(help="Folder of the results.")]
RunPath = Annotated[Path, typer.Option(help="Folder of a run.")]
TextPath = Annotated[Path, typer.Option(help="Folder of the demo's text.")]
Length = Annotated[int, typer.Option(help="New tokens of each text.")]
Quick = Annotated[bool, typer.Option(help="Check that the script works, with few short texts.")]

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def modes(out: Out = Path("runs/diversity"), repeats: int = 20_000, seed: int = 0) -> None:
    """Simulate eight equally common modes, each of 32 plans of 8 bits, which share their first three bits."""
    rng = np.random.default_rng(seed)
    plans = stratify(chance_of_prior(None, 8), 8, 8, rng.random((repeats, numbers_per_set(8, 8))))
    covered = {"the highest bits": [7, 6, 5], "bits 0, 3 and 6": [0, 3, 6]}
    rows = []
    for name, bits in covered.items():
        found = _distinct(plans[..., bits] @ (1 << np.arange(3)))
        rows.append(["stratified", name, f"{found.mean():.2f}", f"{(found == 8).mean():.3f}"])
    independent = rng.integers(8, size=(repeats, 400))
    needed = (independent[..., None] == np.arange(8)).argmax(1).max(1) + 1
    found = _distinct(independent[:, :8])
    rows.append(["independent", "any", f"{found.mean():.2f}", f"{(found == 8).mean():.3f}"])
    caption = (
        f"Eight modes that three bits of the plan distinguish, in 8 texts. Independent plans need {needed.mean():.1f} "
        "texts on average to reach all modes."
    )
    header = ["plans", "bits that distinguish the modes", "modes in 8 texts", "share of sets with all 8"]
    _write(out / "modes", {"needed_by_independent": float(needed.mean()), "rows": rows}, Table(header, rows, caption))


@app.command()
def styles(
    free: RunPath = Path("runs/three_styles/free"),
    baseline: RunPath = Path("runs/three_styles/baseline"),
    text: TextPath = Path("runs/three_styles/text"),
    out: Out = Path("runs/diversity"),
    texts: Annotated[int, typer.Option(help="Texts of each kind and k.")] = 192,
    length: Length = 160,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.8,
    quick: Quick = False,
    seed: int = 0,
) -> None:
    """Count the sources among k texts from an empty prompt."""
    sizes = SIZES[:3] if quick else SIZES
    texts, length = (8, 8) if quick else (texts, length)
    torch.manual_seed(seed)
    models = [Run(path).load_model().eval() for path in (free, baseline)]
    tokenizer = Run(free).load_tokenizer()
    classify = _classifier(text, tokenizer)

    def labels(model: Any, k: int, **options: str) -> np.ndarray:
        """(sets, k)."""
        written = _generate(model, tokenizer, max(1, texts // k), k, length, temperature, **options)
        return classify([each for group in written for each in group]).reshape(-1, k)

    rows, results = [], {}
    pools = {
        "independent plans": labels(models[0], max(sizes), plans="independent").ravel(),
        "baseline": labels(models[1], max(sizes)).ravel(),
    }
    rng = np.random.default_rng(seed)
    for k in sizes:
        sets = {"stratified plans": labels(models[0], k, plans="stratified")}
        for name, pool in pools.items():
            sets[name] = np.array([rng.choice(pool, k, replace=False) for _ in range(1000)])
        found = {name: _distinct(each) for name, each in sets.items()}
        results[k] = {
            name: {"styles": float(each.mean()), "all": float((each == 3).mean()), "sets": len(each)}
            for name, each in found.items()
        }
        error = found["stratified plans"].std() / len(found["stratified plans"]) ** 0.5
        row = [f"{results[k][name]['styles']:.2f}" for name in ("baseline", "independent plans", "stratified plans")]
        rows.append([str(k), row[0], row[1], f"{row[2]} ± {error:.2f}"])
    caption = (
        f"Different sources (of three) among k texts of {length} bytes from an empty prompt, temperature "
        f"{temperature}. ± one standard error."
    )
    header = ["k", "baseline", "independent plans", "stratified plans"]
    shares = {name: (np.bincount(pool, minlength=3) / len(pool)).tolist() for name, pool in pools.items()}
    _write(
        out / "styles", {"temperature": temperature, "shares": shares, "by_k": results}, Table(header, rows, caption)
    )


@app.command()
def curves(
    free: RunPath = Path("runs/three_styles/free"),
    baseline: RunPath = Path("runs/three_styles/baseline"),
    reference: Annotated[Path, typer.Option(help="Folder of a baseline run with another seed.")] = Path(
        "runs/three_styles/reference"
    ),
    text: TextPath = Path("runs/three_styles/text"),
    out: Out = Path("runs/diversity"),
    texts: Annotated[int, typer.Option(help="Texts of each kind and temperature, a multiple of 16.")] = 128,
    length: Length = 160,
    quick: Quick = False,
    seed: int = 0,
) -> None:
    """Measure diversity against NLL under an independent model, by temperature."""
    temperatures = (0.5, 1.0) if quick else TEMPERATURES
    texts, length = (2 * PART, 12) if quick else (texts, length)
    torch.manual_seed(seed)
    tokenizer = Run(free).load_tokenizer()
    classify, scorer = _classifier(text, tokenizer), Run(reference).load_model().eval()
    kinds: dict[str, tuple[Any, dict[str, str]]] = {"baseline": (Run(baseline).load_model().eval(), {})}
    for plans in ("independent", "stratified"):
        kinds[f"{plans} plans"] = (Run(free).load_model().eval(), {"plans": plans})
    found: dict[str, list[dict[str, float]]] = {}
    for name, (model, options) in kinds.items():
        # greedy texts of the baseline are identical
        grid = temperatures if name == "baseline" else (0.0, *temperatures)
        found[name] = []
        for temperature in grid:
            groups = _generate(model, tokenizer, texts // PART, PART, length, temperature, **options)
            nll = float(reference_nll(scorer, tokenizer, [each for group in groups for each in group]).mean())
            found[name].append({"temperature": temperature, "nll": nll, **_diversity(groups, classify)})
            print(name, found[name][-1], flush=True)
    rows = [
        [name, f"{point['temperature']:g}", f"{point['nll']:.3f}", *[f"{point[each]:.3f}" for each in MEASURES]]
        for name, points in found.items()
        for point in points
    ]
    equal = _at_equal_nll(found)
    table = Table(["texts of", "temperature", "NLL, nats per byte", *MEASURES], rows, CURVES_CAPTION)
    at_equal = Table(
        ["NLL, nats per byte", "measure", *found],
        [[f"{nll:.2f}", measure, *[f"{value:.3f}" for value in values]] for nll, measure, values in equal],
        "The same measures at equal NLL, interpolated between temperatures.",
    )
    _write(out / "curves", {"points": found, "at_equal_nll": equal}, table, at_equal)


CURVES_CAPTION = (
    f"Diversity within groups of {PART} texts: entropy of their sources in bits, share of distinct word pairs, and "
    "self-BLEU (0 to 100, lower is more diverse)."
)
MEASURES = ("source entropy", "distinct pairs", "self-BLEU")


def _diversity(groups: Sequence[list[str]], classify: Callable[[Sequence[str]], np.ndarray]) -> dict[str, float]:
    values = (
        np.mean([label_entropy(classify(group)) for group in groups]),
        np.nanmean([distinct_n(group) for group in groups]),  # NaN: texts of single words
        np.mean([self_bleu(group) for group in groups]),
    )
    return dict(zip(MEASURES, map(float, values), strict=True))


def _at_equal_nll(found: dict[str, list[dict[str, float]]]) -> list[tuple[float, str, list[float]]]:
    """Each measure at NLLs that all kinds of texts reach."""
    lowest = max(min(point["nll"] for point in points) for points in found.values())
    highest = min(max(point["nll"] for point in points) for points in found.values())
    equal = []
    for nll in np.linspace(lowest, highest, 5):
        for measure in MEASURES:
            values = []
            for points in found.values():
                ordered = sorted(points, key=lambda point: point["nll"])
                values.append(
                    float(np.interp(nll, [each["nll"] for each in ordered], [each[measure] for each in ordered]))
                )
            equal.append((float(nll), measure, values))
    return equal


def _generate(
    model: Any, tokenizer: Any, groups: int, k: int, length: int, temperature: float, **options: str
) -> list[list[str]]:
    """Groups of k texts from an empty prompt."""
    own = {"prompt_plan": "prior", **options} if isinstance(model, FreeTransformer) else {}
    at_once = max(1, BATCH // k)
    found = []
    for start in range(0, groups, at_once):
        prompt = torch.full((min(at_once, groups - start), 1), tokenizer.bos_token_id)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            do_sample=temperature > 0,
            num_return_sequences=k,
            **({"temperature": temperature, "top_k": 0} if temperature else {}),
            **own,
        )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        found += [texts[first : first + k] for first in range(0, len(texts), k)]
    return found


def _classifier(text: Path, tokenizer: Any) -> StyleClassifier:
    """The demo's classifier of sources."""
    held_out = read_rows(text / "validation.jsonl", tokenizer, 256)
    return train_classifier(text / "train.jsonl", tokenizer, held_out)[0]


def _distinct(labels: np.ndarray) -> np.ndarray:
    """Number of different labels in each row, (sets, k) -> (sets,)."""
    ordered = np.sort(labels, 1)
    return 1 + (np.diff(ordered, axis=1) != 0).sum(1)


def _write(path: Path, result: object, *tables: Table) -> None:
    """`path.json` and `path.md`."""
    text = "\n\n".join(table.to_markdown() for table in tables)
    write_text(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_text(path.with_suffix(".md"), text + "\n")
    print(text)


if __name__ == "__main__":
    app()
