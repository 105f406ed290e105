"""
Compares exports and 8-bit weights in one run: bytes, time per token, likelihood and control.

The first table is for the model of `make demo`. The second is for a larger model with random weights, so that only
bytes and time are meaningful. `make bench-deployment`; docs/performance.md.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison_report import table
from torch import Tensor
from transformers.utils import logging

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.deploy import OnnxFreeTransformer
from free_transformer.evaluation import Likelihood, compare, evaluate_likelihood, measure_control
from free_transformer.export.files import SCHEMES
from free_transformer.export.onnx import export_onnx
from free_transformer.export.quantize import quantize
from free_transformer.files import write_json
from free_transformer.model.outputs import LowerOutput
from free_transformer.training import Run

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "three_styles"))
from demo import EXAMPLES_PER_STYLE, read_rows, train_classifier

ROUNDS = 7
PROMPT, NEW_TOKENS = 32, 96
BATCHES = (1, 8)
LIKELIHOOD_TEXTS, LIKELIHOOD_SAMPLES = 200, 16
LARGE = {"vocab_size": 8192, "hidden_dim": 512, "num_layers": 12, "num_heads": 8, "latent_dim": 8}


class ByOnnx(FreeTransformer):
    """A model whose layers run in onnxruntime, so that the library's evaluation can be applied to an export."""

    exported: OnnxFreeTransformer
    tokens: Tensor

    def lower_layers(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> LowerOutput:  # type: ignore[override]
        self.tokens = input_ids
        return super().lower_layers(input_ids, *args, **kwargs)  # only for the layout of plans

    def encode(self, lower: LowerOutput) -> Tensor:
        return torch.from_numpy(self.exported.infer_plan(self.tokens.numpy()))

    def upper_layers(self, lower: LowerOutput, plan: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch, tokens = self.tokens.shape
        inputs = {"input_ids": self.tokens, "attention_mask": torch.ones_like(self.tokens), "plan": plan}
        inputs["columns"] = torch.arange(tokens)
        arrays = {name: values.numpy() for name, values in inputs.items()}
        return torch.from_numpy(self.exported.run("decode", arrays, self.exported.no_past(batch))[0].numpy())

    def generate(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        options["plan"] = options["plan"].numpy()
        options.pop("pad_token_id", None)
        return torch.from_numpy(self.exported.generate(inputs.numpy(), seed=int(torch.randint(2**31, ())), **options))


@dataclass
class Variant:
    """One way to run the model, and the bytes of the weights that generation needs."""

    name: str
    model: FreeTransformer
    size: int


def variants(model: FreeTransformer, folder: Path) -> list[Variant]:
    model.save_pretrained(folder / "float32")
    found = [Variant("PyTorch, float32", model, _bytes(folder / "float32", "*.safetensors"))]
    for scheme in SCHEMES:
        quantized = quantize(model, scheme, folder / scheme)
        found.append(Variant(f"PyTorch, {scheme}", quantized, _bytes(folder / scheme, "*.safetensors")))
    for scheme in (None, *SCHEMES):
        export = export_onnx(model, folder / f"onnx-{scheme}", quantize=scheme)
        if scheme is None:
            logits = max(each.difference for each in export.differences if each.output == "logits")
            print(f"ONNX against PyTorch, float32: logits differ by at most {logits:.1e}")
        by_onnx = copy.copy(model)
        by_onnx.__class__ = ByOnnx
        by_onnx.exported = OnnxFreeTransformer(export.folder)
        size = _bytes(export.folder, "decode.onnx*") + _bytes(export.folder, "encode.onnx*")
        found.append(Variant(f"onnxruntime, {scheme or 'float32'}", by_onnx, size))
    return found


def time_per_token(found: list[Variant], batch: int) -> dict[str, list[float]]:
    """Milliseconds per token of a batch, with the variants in turns."""
    torch.manual_seed(0)
    prompt = torch.randint(3, 250, (batch, PROMPT))
    plan = found[0].model.sample_plan(batch, 1)
    times: dict[str, list[float]] = {variant.name: [] for variant in found}
    for turn in range(ROUNDS + 1):
        for variant in found:
            started = time.perf_counter()
            variant.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                plan=plan,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=(),
                pad_token_id=0,
            )
            if turn:  # the first is a warm-up
                times[variant.name].append(1000 * (time.perf_counter() - started) / NEW_TOKENS)
    return times


def evaluate(found: list[Variant], run_folder: Path) -> dict[str, dict[str, Any]]:
    """Likelihood of the same held-out texts with the same samples, and control as in the demo."""
    run = Run(run_folder / "free")
    tokenizer = run.load_tokenizer()
    text = run_folder / "text"
    held_out = read_rows(text / "validation.jsonl", tokenizer, run.settings.training.seq_len)
    rows = held_out.rows.sample(LIKELIHOOD_TEXTS)
    classify, _ = train_classifier(text / "train.jsonl", tokenizer, held_out)
    tokens = torch.from_numpy(held_out.rows.tokens).long()
    results: dict[str, dict[str, Any]] = {}
    reference: Likelihood | None = None
    for variant in found:
        torch.manual_seed(0)
        batches = [{"input_ids": batch["input_ids"]} for batch in rows.in_order(32)]
        likelihood = evaluate_likelihood(variant.model, batches, LIKELIHOOD_SAMPLES)
        reference = reference or likelihood
        rise = compare(likelihood, reference)
        torch.manual_seed(0)
        control = measure_control(
            variant.model, None, tokenizer, classify, tokens, held_out.styles, examples_per_label=EXAMPLES_PER_STYLE
        )
        results[variant.name] = {
            "nll": likelihood.nll,
            "rise": rise.difference,
            "rise_error": rise.standard_error,
            "agreement": control.agreement,
            "transfer": control.transfer,
            "mutual_information": control.mutual_information,
        }
        print(variant.name, results[variant.name], flush=True)
    return results


def measure(found: list[Variant], evaluated: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Measures times, prints everything as a table, and returns it."""
    times = {batch: time_per_token(found, batch) for batch in BATCHES}
    first = found[0]
    header = ["", "MB", *(f"ms per token, batch {batch}" for batch in BATCHES)]
    if evaluated is not None:
        header += ["nll", "rise", "agreement", "transfer", "mutual information"]
    lines, rows = [], {}
    for variant in found:
        medians = {batch: statistics.median(times[batch][variant.name]) for batch in BATCHES}
        against = {batch: medians[batch] / statistics.median(times[batch][first.name]) for batch in BATCHES}
        cells = [variant.name, f"{variant.size / 1e6:.2f}"]
        cells += [f"{medians[batch]:.2f} ({against[batch]:.2f} x)" for batch in BATCHES]
        rows[variant.name] = {"bytes": variant.size, "milliseconds": {b: times[b][variant.name] for b in BATCHES}}
        if evaluated is not None:
            values = evaluated[variant.name]
            rows[variant.name] |= values
            cells += [f"{values['nll']:.4f}", f"{values['rise']:+.4f} ± {values['rise_error']:.4f}"]
            cells += [f"{values[name][0]:.3f} ± {values[name][1]:.3f}" for name in ("agreement", "transfer")]
            cells.append(f"{values['mutual_information']:.3f}")
        lines.append(cells)
    print(f"\n{table(header, lines)}", flush=True)
    return rows


def _bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/three_styles"), help="folder of `make demo`")
    parser.add_argument("--out", type=Path, default=Path("runs/deployment.json"))
    parser.add_argument("parts", nargs="*", help="demo, large, or both (default)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    builders: dict[str, tuple[Callable[[], FreeTransformer], bool]] = {
        "demo": (lambda: Run(options.run / "free").load_model(), True),
        "large": (lambda: FreeTransformer(FreeTransformerConfig(**LARGE, plan_span="sequence")).eval(), False),
    }
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name in options.parts or builders:
        build, trained = builders[name]
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            found = variants(build(), Path(folder))
            results[name] = measure(found, evaluate(found, options.run) if trained else None)
            write_json(options.out, results)


if __name__ == "__main__":
    main()
