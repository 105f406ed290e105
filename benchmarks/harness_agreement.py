"""
Compares a Llama in the harness's own `hf` with its weights in a Free Transformer whose plan has no effect (R = 0).

Four kinds of local tasks; every log-likelihood, text and metric is compared. docs/results-pretrained.md.

    python benchmarks/harness_agreement.py LLAMA        a folder with a Llama and its tokenizer; minutes on one core
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from comparison_report import table
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from free_transformer import FreeTransformer
from free_transformer.integrations.harness import PlanHarnessLM, run_tasks

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid", "Cuba": "Havana",
    "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima", "Greece": "Athens", "Canada": "Ottawa", "Austria": "Vienna",
}  # fmt: skip
SAYINGS = [
    "A bird in the hand is worth two in the bush.",
    "The early bird catches the worm, but the second mouse gets the cheese.",
    "All that glitters is not gold, and not all who wander are lost. Still water runs deep.",
    "When in Rome, do as the Romans do. When at home, wash the dishes, water the plants, and write to your friends.",
    "Every cloud has a silver lining; every rose has its thorn.",
    "Practice makes perfect. " * 12,
]
SUMS = [(a, b) for a in (2, 7, 15, 31) for b in (1, 4, 9)]
TASKS = {
    "capitals": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "sums": "output_type: loglikelihood\ndoc_to_target: ' {{answer}}'\ntarget_delimiter: ''\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "sayings": "output_type: loglikelihood_rolling\ndoc_to_target: '{{answer}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "write": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['.', \"\\n\"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n"
    "filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]\n",
}


def items(name: str) -> list[dict[str, Any]]:
    if name == "sums":
        return [{"question": f"{a} + {b} =", "answer": str(a + b)} for a, b in SUMS]
    if name == "sayings":
        return [{"question": "", "answer": text} for text in SAYINGS]
    names = list(CAPITALS.values())
    rows = []
    for place, (country, capital) in enumerate(CAPITALS.items()):
        choices = [names[(place + step) % len(names)] for step in range(4)]
        question = f"The capital of {country} is"
        rows.append({"question": question, "choices": choices, "gold": 0, "answer": capital})
    return rows


def write_tasks(folder: Path) -> None:
    """A YAML file with JSONL data for each task."""
    for name, body in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in items(name)))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}doc_to_text: '{{{{question}}}}'\n{body}")


class _Kept:
    """Keeps a model's answers to every request, in addition to the harness's metrics."""

    def __init__(self, lm: HFLM):
        self.answers: list[Any] = []
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, self._keeping(getattr(lm, kind)))

    def _keeping(self, method: Any) -> Any:
        def call(requests: list[Instance], *args: Any, **kwargs: Any) -> list[Any]:
            answers = method(requests, *args, **kwargs)
            self.answers += answers
            return answers

        return call


def compare(llama: Path, dtype: torch.dtype, num_plans: int, batch_size: int) -> list[list[str]]:
    """A row for each metric: task, metric, both values, and how many answers are bit-for-bit equal."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    shared = {"tokenizer": tokenizer, "batch_size": batch_size}
    theirs = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(llama, dtype=dtype), **shared)
    ours = PlanHarnessLM(FreeTransformer.from_pretrained(llama, dtype=dtype).eval(), num_plans=num_plans, **shared)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        kept = [_Kept(theirs), _Kept(ours)]
        for task in TASKS:
            for each in kept:
                each.answers.clear()
            both = [run_tasks(lm, [task], folder)["results"][task] for lm in (theirs, ours)]
            equal = sum(one == other for one, other in zip(kept[0].answers, kept[1].answers, strict=True))
            of_requests = f"{equal} of {len(kept[0].answers)}"
            for name, value in both[0].items():
                if "," in name and "_stderr" not in name:
                    rows.append([task, name.split(",")[0], f"{value:.6f}", f"{both[1][name]:.6f}", of_requests])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path, help="folder of a Llama with its tokenizer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--num-plans", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows = compare(options.llama, getattr(torch, options.dtype), options.num_plans, options.batch_size)
    print(table(["task", "metric", "hf", "R = 0", "answers equal bit-for-bit"], rows))


if __name__ == "__main__":
    main()
