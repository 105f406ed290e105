"""
Does a text keep its style far beyond the window of attention? Trains a Free Transformer and baselines on three text
sources, generates long texts with each, and classifies them segment by segment. `make coherence`, then open
runs/coherence/report.html. The same for the fine-tuned models of `make demo-pretrained`:
`python examples/three_styles/coherence.py --pretrained runs/pretrained/styles --out runs/coherence-pretrained`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import read_rows, train_classifier
from rich.console import Console
from styles import STYLES, write_corpus

from free_transformer.cli.exit_status import as_command
from free_transformer.data import load_tokenizer
from free_transformer.evaluation import Coherence, measure_coherence
from free_transformer.files import claimed_folder, write_json, write_text
from free_transformer.model.modeling import FreeTransformer
from free_transformer.reporting.plots import shares_by_position
from free_transformer.reporting.report import Report
from free_transformer.reporting.table import Table
from free_transformer.runs.load_model import load_pretrained
from free_transformer.training import Run

WINDOW = 256  # tokens that each model can look back on, except the wide baseline; two segments
MODELS = {  # settings on top of the configuration
    "free": [],
    "baseline": ["model.kind=baseline"],
    "wide baseline": ["model.kind=baseline", f"training.seq_len={4 * WINDOW}", "training.batch_size=4"],
}
STRENGTHS = {1.0: (1.0, 1.5), 0.7: (1.0, 1.5, 2.0)}  # values of `plan_strength` by temperature, aggregate prior
SCORER_SEED = 1000
STYLE_IDS = range(len(STYLES))
FILES = ["text", "measured", "results.json", "results.md", "report.html"]
FILES += [f"temperature-{temperature:g}.png" for temperature in STRENGTHS]
console = Console()


@dataclass(frozen=True)
class Setting:
    """How texts are generated. A baseline has no prior."""

    temperature: float
    prior: str | None = None
    strength: float = 1.0

    @classmethod
    def of(cls, model: str) -> list["Setting"]:
        """The settings of one of the `MODELS`."""
        if model != "free":
            return [cls(temperature) for temperature in STRENGTHS]
        found = [cls(temperature, "uniform") for temperature in STRENGTHS]
        return found + [cls(each, "aggregate", strength) for each, given in STRENGTHS.items() for strength in given]

    def name(self, model: str) -> str:
        if self.prior is None:
            return model
        return f"{model}, {self.prior} prior" + (f", strength {self.strength:g}" if self.strength != 1 else "")


@dataclass
class Result:
    """Coherence of the texts of one model and one setting of generation."""

    seed: int
    model: str
    setting: Setting
    coherence: Coherence
    seconds: float
    texts: list[str]

    @property
    def name(self) -> str:
        return self.setting.name(self.model)

    @property
    def nll_by_style(self) -> list[float]:
        """Mean NLL of the segments of each style, in nats per token: styles differ in how predictable they are."""
        labels, nll = self.coherence.labels, self.coherence.segment_nll
        assert nll is not None
        return [float(nll[labels == style].mean()) if (labels == style).any() else float("nan") for style in STYLE_IDS]

    def to_json(self, marks: list[int]) -> dict[str, object]:
        nll = self.coherence.segment_nll
        assert nll is not None
        return {
            "seed": self.seed,
            "model": self.model,
            **asdict(self.setting),
            "share in the style of the beginning": {mark: self.coherence.share_at(mark)[0] for mark in marks},
            "chance at the end": self.coherence.chance_at(marks[-1]),
            "switches per 1,000 tokens": self.coherence.switches_per_1000_tokens,
            "texts that end in each style": self.coherence.counts_at_end(len(STYLES)),
            "nll of segments, nats per token": float(nll.mean()),
            "nll of segments by style": self.nll_by_style,
            "nll of the last quarter": float(nll[:, -(nll.shape[1] // 4) :].mean()),
            "seconds": round(self.seconds, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/three_styles.yaml", help="settings of all runs")
    parser.add_argument("--out", type=Path, default=Path("runs/coherence"), help="folder of runs and report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pretrained", type=Path, help="measure the runs that `make demo-pretrained` saved here")
    parser.add_argument("--texts", type=int, default=64, help="number of texts of each model")
    parser.add_argument("--windows", type=int, default=64, help="length of each text, in windows of a training row")
    parser.add_argument("overrides", nargs="*", help="changes to the settings, as in training.max_steps=100")
    options = parser.parse_args()
    with claimed_folder(options.out, "long text", FILES):
        run(options)


def run(options: argparse.Namespace) -> None:
    corpus, runs, scorer, segment = find_runs(options) if options.pretrained else train_all(options)
    jobs = [(name, seed, setting) for name, seed in runs for setting in Setting.of(name)]
    # the slowest last
    jobs.sort(key=lambda job: (job[0] == "wide baseline", job[2].temperature != 0.7, job[2].prior == "uniform"))
    results = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _begin_worker, (corpus, scorer, segment)) as pool:
        futures = [pool.submit(_measure, runs[name, seed].path, options, name, seed, how) for name, seed, how in jobs]
        for future in futures:
            results.append(future.result())
            console.print(results[-1].to_json(marks_of(options.windows)))
        accuracy = pool.submit(_accuracy).result()
    write_results(options, results, accuracy)


_worker: dict[str, Any] = {}  # the classifier and the scorer of a process


def _begin_worker(corpus: Path, scorer: Path, segment: int) -> None:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(scorer))
    held_out = read_rows(corpus / "validation.jsonl", tokenizer, segment)
    classify, accuracy = train_classifier(corpus / "train.jsonl", tokenizer, held_out)
    _worker.update(classify=classify, accuracy=accuracy, scorer=load_pretrained(scorer), tokenizer=tokenizer)
    _worker["segment"] = segment


def _accuracy() -> float:
    return float(_worker["accuracy"])


def _measure(path: Path, options: argparse.Namespace, name: str, seed: int, setting: Setting) -> Result:
    """Generates texts and classifies them, unless that has been done before."""
    kept = options.out / "measured" / f"{name} {seed} {setting.temperature:g} {setting.name('')} {options.windows}.json"
    size, segment = {"texts": options.texts, "windows": options.windows}, _worker["segment"]
    if kept.is_file():
        stored = json.loads(kept.read_text(encoding="utf-8"))
        if stored["size"] == size:
            coherence = Coherence(np.array(stored["labels"]), segment, np.array(stored["nll"]))
            return Result(seed, name, setting, coherence, stored["seconds"], stored["texts"])
    model, tokenizer = Run.open(path).load_model(), _worker["tokenizer"]
    started = time.perf_counter()
    if options.pretrained:
        model.config.max_position_embeddings = 2 * segment
    tokens = generate(model, tokenizer, options, seed, setting, 2 * segment * options.windows)
    seconds = time.perf_counter() - started
    coherence = measure_coherence(tokens, tokenizer, _worker["classify"], segment, _worker["scorer"])
    texts = tokenizer.batch_decode(tokens[:6], skip_special_tokens=True)
    assert coherence.segment_nll is not None
    found = {"labels": coherence.labels.tolist(), "nll": coherence.segment_nll.tolist()}
    write_json(kept, {"size": size, **found, "seconds": seconds, "texts": texts})
    return Result(seed, name, setting, coherence, seconds, texts)


Runs = dict[tuple[str, int], Run]  # by model and seed


def find_runs(options: argparse.Namespace) -> tuple[Path, Runs, Path, int]:
    """As `train_all`, for the runs of `make demo-pretrained`. The pretrained model scores the generated texts."""
    folder, seed = options.pretrained, options.seeds[0]
    runs = {(name, seed): Run.open(folder / name) for name in ("free", "baseline")}
    settings = runs["free", seed].settings
    return folder / "text", runs, Path(settings.model.pretrained or ""), settings.training.seq_len // 2


def train_all(options: argparse.Namespace) -> tuple[Path, Runs, Path, int]:
    """The folder of the text, the runs, the model that scores the generated texts, and the tokens of a segment."""
    corpus = options.out / "text"
    write_corpus(corpus)
    wanted = {(name, seed): MODELS[name] for seed in options.seeds for name in options.models}
    runs = train_missing(options, {**wanted, ("baseline", SCORER_SEED): MODELS["baseline"]}, corpus)
    return corpus, runs, runs.pop(("baseline", SCORER_SEED)).model_folder, WINDOW // 2


def train_missing(options: argparse.Namespace, wanted: dict[tuple[str, int], list[str]], corpus: Path) -> Runs:
    """Trains the runs that are not finished, as many at a time as there are cores, one core each."""
    data = [f"data.train={corpus / 'train.jsonl'}", f"data.validation={corpus / 'validation.jsonl'}"]
    runs = {(name, seed): Run(options.out / f"{name.replace(' ', '-')}-{seed}") for name, seed in wanted}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {
            pool.submit(
                _train, run, options.config, [f"training.seed={key[1]}", *data, *wanted[key], *options.overrides]
            )
            for key, run in runs.items()
        }
        for each in started:
            each.result()
    return runs


def _train(run: Run, config: str, overrides: list[str]) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    log = run.path / "log.txt"
    console.print(f"training {run.path} (log in {log})")
    command = [sys.executable, "-m", "free_transformer", "train", config, f"run_dir={run.path}", *overrides]
    with log.open("w") as file:
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    if done.returncode != 0:
        raise SystemExit(f"training {run.path} failed: see {log}")


def generate(
    model: Any, tokenizer: Any, options: argparse.Namespace, seed: int, setting: Setting, length: int
) -> torch.Tensor:
    """Texts from an empty prompt, (texts, length), without the begin-of-text token."""
    torch.manual_seed(seed)
    text = torch.full((options.texts, 1), tokenizer.bos_token_id)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": setting.temperature, "top_k": 0}
    sampling["suppress_tokens"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    if isinstance(model, FreeTransformer):
        model.config.plan_strength = setting.strength
        sampling["plan"] = model.sample_plan(options.texts, 1, prior=setting.prior)
        return model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=length, **sampling)[:, 1:]
    context = model.config.max_position_embeddings
    while text.shape[1] <= length:  # as a Free Transformer does: a full context is read again from its middle
        seen = text if text.shape[1] < context else text[:, -(context // 2) :]
        new = min(context - seen.shape[1], length + 1 - text.shape[1])
        more = model.generate(seen, attention_mask=torch.ones_like(seen), max_new_tokens=new, **sampling)
        text = torch.cat([text, more[:, seen.shape[1] :]], 1)
    return text[:, 1:]


def marks_of(windows: int) -> list[int]:
    """Segments that tables show: the last of 2, 4, 8, ... windows."""
    return [2 * 2**i for i in range(1, 20) if 2**i <= windows]


def table(results: list[Result], marks: list[int]) -> Table:
    segment = results[0].coherence.segment_tokens
    header = ["seed", "model", "temperature", *(f"after {mark * segment:,}" for mark in marks)]
    header += ["switches", "styles at the end", "NLL of segments"]
    rows = []
    for each in results:
        coherence = each.coherence
        assert coherence.segment_nll is not None
        shares = [f"{coherence.share_at(mark)[0]:.2f}" for mark in marks]
        ends = " / ".join(map(str, coherence.counts_at_end(len(STYLES))))
        rows.append(
            [
                *(str(each.seed), each.name, f"{each.setting.temperature:g}", *shares),
                *(f"{coherence.switches_per_1000_tokens:.2f}", ends, f"{coherence.segment_nll.mean():.3f}"),
            ]
        )
    caption = (
        "Share of texts still in the style of their segments 2 to 4 after so many tokens; changes of style from one "
        f"segment of {segment} tokens to the next, per 1,000 tokens; texts that end in each style "
        f"({', '.join(STYLES)}); mean NLL of segments under an independent model, in nats per token."
    )
    return Table(header, rows, caption)


def mean_table(results: list[Result], marks: list[int]) -> Table:
    """As `table`, with one row for all seeds."""
    segment = results[0].coherence.segment_tokens
    groups: dict[tuple[str, float], list[Result]] = {}
    for each in results:
        groups.setdefault((each.name, each.setting.temperature), []).append(each)
    header = ["model", "temperature", *(f"after {mark * segment:,}" for mark in marks), "lowest of a seed", "chance"]
    header += ["switches", "styles at the end", "NLL of segments by style"]
    rows = []
    for (name, temperature), group in groups.items():
        shares = np.array([[each.coherence.share_at(mark)[0] for mark in marks] for each in group])
        switches = np.mean([each.coherence.switches_per_1000_tokens for each in group])
        ends = np.sum([each.coherence.counts_at_end(len(STYLES)) for each in group], 0)
        nll = np.ma.masked_invalid([each.nll_by_style for each in group]).mean(0).filled(np.nan)
        cells = [name, f"{temperature:g}", *(f"{share:.3f}" for share in shares.mean(0)), f"{shares[:, -1].min():.3f}"]
        cells.append(f"{np.mean([each.coherence.chance_at(marks[-1]) for each in group]):.3f}")
        rows.append([*cells, f"{switches:.2f}", " / ".join(map(str, ends)), " / ".join(f"{each:.3f}" for each in nll)])
    caption = (
        f"Mean over {len({each.seed for each in results})} seeds of the columns of the table below. Lowest of a seed: "
        "the share after the last token. Chance: that share if the end of a text did not depend on its beginning. "
        "Styles at the end: texts of all seeds. NLL of segments: mean over those of each style "
        f"({', '.join(STYLES)})."
    )
    return Table(header, sorted(rows, key=lambda row: row[1], reverse=True), caption)


def write_results(options: argparse.Namespace, results: list[Result], accuracy: float) -> None:
    marks, segment = marks_of(options.windows), results[0].coherence.segment_tokens
    found = {
        "texts": options.texts,
        "window": 2 * segment,
        "segment": segment,
        "accuracy of the classifier": accuracy,
        "results": [each.to_json(marks) for each in results],
    }
    write_json(options.out / "results.json", found)
    tables = [mean_table(results, marks), table(results, marks)]
    write_text(options.out / "results.md", "\n\n".join(each.to_markdown() for each in tables))
    report = Report("Style beyond the window")
    report.paragraph(
        f"Each model generated {options.texts} texts of {options.windows * 2 * segment:,} tokens from an empty prompt. "
        f"A token can look back on {2 * segment} tokens. A classifier that sees one segment of {segment} tokens at a "
        f"time assigns its style (accuracy on held-out segments: {accuracy:.3f})."
    )
    report.table(tables[0])
    for temperature in STRENGTHS:
        some = [each for each in results if each.setting.temperature == temperature]
        report.heading(f"Temperature {temperature:g}")
        lines: dict[str, list[np.ndarray]] = {}
        for each in some:
            same = each.coherence.labels == each.coherence.beginning[:, None]
            lines.setdefault(each.name, []).append(same.mean(0))
        means = {name: np.mean(shares, 0) for name, shares in lines.items()}
        figure = shares_by_position(means, segment, chance=1 / len(STYLES))
        figure.savefig(options.out / f"temperature-{temperature:g}.png", dpi=100)  # docs/plots has the one of 1
        report.figure(figure, "share of texts in the style of their beginning, by position; mean over seeds")
        report.table(table(some, marks))
    report.heading("Texts")
    report.paragraph("The beginning and the end of the first texts of seed " + str(options.seeds[0]) + ".")
    for each in results:
        if each.seed == options.seeds[0]:
            report.heading(f"{each.name}, temperature {each.setting.temperature:g}", level=3)
            report.samples([(f"text {i + 1}", f"{t[:300]}\n\n[…]\n\n{t[-300:]}") for i, t in enumerate(each.texts)])
    report.write(options.out / "report.html")
    console.print(tables[0].to_rich())
    console.print(f"open {options.out / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    with as_command():
        main()
