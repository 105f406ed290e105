"""
Learning at a size that a CPU does not reach: the demo's three sources of text, a model of 26 M parameters with one plan
of 8 bits per sequence, and its baseline, trained at the same time on one GPU and evaluated like the demo.

The windows stay at 256 bytes, for which the demo's classifier was chosen, so that its figures compare with those of
docs/demo.md.
"""

import gzip
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, card, options_of

from free_transformer.evaluation import compare, evaluate_likelihood, generate_texts, measure_control
from free_transformer.model.plan_text import format_plan
from free_transformer.training import Run

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "examples/three_styles"))
import demo  # noqa: E402
from styles import write_corpus  # noqa: E402

STEPS, SECONDS = 2000, 240  # with less time, fewer steps
SIZES = {
    "model.hidden_dim": 512,
    "model.num_layers": 8,
    "model.num_heads": 8,
    "training.batch_size": 64,
    "training.learning_rate": 1.5e-3,
    "training.precision": "bf16",
    "training.eval_every": 500,
    "evaluation.rows": 256,
    "checkpoint.keep_best": "true",
    "training.save_every": 0,
    "logging.sample_every": 0,
}
SMALL = {"model.hidden_dim": 32, "model.num_layers": 2, "model.num_heads": 2, "training.batch_size": 4}
RANDOM_PLANS, TEXTS_PER_PLAN, EXAMPLES = 32, 16, 96
LIKELIHOOD_ROWS, LIKELIHOOD_SAMPLES = 1000, 16


class Learning:
    """The stages of the measurement. Each uses the results of the previous ones."""

    def __init__(self, options: Any):
        self.options = options
        self.out = options.out.parent / "learning"
        self.text = self.out / "text"
        self.numbers = (2, 2, 2) if options.small else (RANDOM_PLANS, TEXTS_PER_PLAN, EXAMPLES)

    def unpack(self) -> None:
        """The text of `bundle.sh`, or the demo's if there is none."""
        self.text.mkdir(parents=True, exist_ok=True)
        bundled = ROOT / ".gpu" / "text"
        if not bundled.is_dir():
            write_corpus(self.text)
            return
        for name in ("train", "validation"):
            content = gzip.decompress((bundled / f"{name}.jsonl.gz").read_bytes())
            (self.text / f"{name}.jsonl").write_bytes(content)

    def train(self) -> dict[str, Any]:
        """Trains both runs at the same time, each in its own process."""
        steps = 4 if self.options.small else round(STEPS * self.options.seconds / SECONDS)
        values = {**SIZES, **(SMALL if self.options.small else {}), "training.max_steps": steps}
        values |= {
            "training.warmup_steps": min(150, steps // 2),
            "evaluation.prior_rows": 64 if self.options.small else 1024,
        }
        values |= {"data.train": self.text / "train.jsonl", "data.validation": self.text / "validation.jsonl"}
        started, running = time.perf_counter(), {}
        for kind in ("free", "baseline"):
            command = [sys.executable, "-m", "free_transformer", "train", str(ROOT / "configs/three_styles.yaml")]
            command += [f"run_dir={self.out / kind}", f"model.kind={kind}", *(f"{k}={v}" for k, v in values.items())]
            log = (self.out / f"{kind}.log").open("w")
            running[kind] = subprocess.Popen(command, stdout=log, stderr=log)
        codes = {kind: process.wait() for kind, process in running.items()}
        if any(codes.values()):
            tails = {kind: (self.out / f"{kind}.log").read_text()[-1500:] for kind, code in codes.items() if code}
            raise RuntimeError(f"training failed: {tails}")
        seconds = time.perf_counter() - started
        return {"steps": steps, "seconds": seconds, **{kind: self.speed(kind) for kind in running}}

    def speed(self, kind: str) -> dict[str, Any]:
        lines = Run(self.out / kind).read_metrics()
        speeds = sorted(line["tokens_per_second"] for line in lines if line["split"] == "train")
        validation = [[line["step"], line["loss"]] for line in lines if line["split"] == "validation"]
        return {"tokens_per_second": speeds[len(speeds) // 2], "validation_loss": validation}

    def load(self) -> dict[str, int]:
        runs = [Run(self.out / kind) for kind in ("free", "baseline")]
        self.tokenizer = runs[0].load_tokenizer()
        self.free, self.baseline = (run.load_model().to(self.options.device) for run in runs)
        length = runs[0].settings.training.seq_len
        self.held_out = demo.read_rows(self.text / "validation.jsonl", self.tokenizer, length)
        return {kind: model.num_parameters() for kind, model in (("free", self.free), ("baseline", self.baseline))}

    def likelihood(self) -> dict[str, Any]:
        """Likelihoods in nats per byte, with the difference paired by window."""
        part = self.held_out.rows.sample(8 if self.options.small else LIKELIHOOD_ROWS)
        samples = 2 if self.options.small else LIKELIHOOD_SAMPLES
        free, base = (evaluate_likelihood(each, part.in_order(64), samples) for each in (self.free, self.baseline))
        result, per_byte = compare(free, base), 1 / part.bytes_per_token
        return {
            "nll": result.nll * per_byte,
            "baseline_nll": result.baseline_nll * per_byte,
            "difference": result.difference * per_byte,
            "standard_error": result.standard_error * per_byte,
            "kl": free.kl,
            "gap": free.gap,
            "windows": len(part),
        }

    def control(self) -> dict[str, Any]:
        """Shares with their standard errors, and bits; see `measure_control`."""
        classify, accuracy = demo.train_classifier(self.text / "train.jsonl", self.tokenizer, self.held_out)
        tokens = torch.from_numpy(self.held_out.rows.tokens).long()
        plans, texts, examples = self.numbers
        found = measure_control(
            *(self.free, self.baseline, self.tokenizer, classify, tokens, self.held_out.styles, plans, texts),
            examples_per_label=examples,
        )
        self.plans = found.plans
        names = ("agreement", "agreement_shuffled", "agreement_baseline", "transfer", "transfer_shuffled")
        bits = ("mutual_information", "mutual_information_shuffled", "label_entropy")
        values = {name: getattr(found, name) for name in (*names, *bits)}
        return {**values, "classifier_accuracy": accuracy, "plans": plans, "texts_per_plan": texts}

    def samples(self) -> list[dict[str, str]]:
        """The beginning of a text under each of four plans."""
        plans = self.plans[:4]
        texts = generate_texts(self.free, self.tokenizer, len(plans), 200, 0.7, plan=plans)
        return [{"plan": format_plan(p.cpu()), "text": t} for p, t in zip(plans, texts, strict=True)]


def main() -> None:
    options = options_of(__doc__, "learning.json", SECONDS)
    results, learning = Results(options.out, options.seconds), Learning(options)
    results.record("card", lambda: card(options.device, options.small))
    for stage in ("unpack", "train", "load", "likelihood", "control", "samples"):
        results.record(stage, getattr(learning, stage))


if __name__ == "__main__":
    main()
