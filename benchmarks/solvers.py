"""
pass@k on a task with a hidden mixture of solvers: does the plan separate them, and do stratified plans help?

A problem is a full binary tree of 15 letters, level by level, and the letter to find. A solution is the letters that a
solver visits until it finds that one, or gives up after 8 visits. Half of the training texts are solved by depth-first
and half by breadth-first search (`--solvers 4`: or by their mirror images, within 5 visits). There are no labels.
Each solver finds letters that the others do not reach in time, so that a sample solves such a problem only if it uses
the right solver. With `--notation own`, each solver has its own sign between the letters, as sources of
solutions differ in style; with `--notation same`, only the order of the letters distinguishes them.

The first plan of a text covers the problem, the second its solution. `python benchmarks/solvers.py --out runs/solvers`
creates the texts, trains a Free Transformer and its baseline with `free-transformer train`, and measures pass@k.
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from free_transformer.data import begin_token, encode
from free_transformer.evaluation.control import mutual_information
from free_transformer.files import write_text
from free_transformer.model.plan import codes_to_bits
from free_transformer.reporting.table import Table
from free_transformer.training import Run

LETTERS, NODES = "abcdefghijklmnopqrstuvwxyz", 15
SPAN = NODES + 4  # begin-of-text, the tree, "?", the letter, ":"
LATENT_DIM = 4
SOLVERS = ("depth-first", "breadth-first", "depth-first, mirrored", "breadth-first, mirrored")
SIGNS = {"own": (">", ",", "/", ";"), "same": ("",) * 4}  # between the letters of a solution, for each solver
HELD_OUT = 1000
BUDGETS = {2: 8, 4: 5}  # visits
SEQ_LEN = SPAN + 2 * max(BUDGETS.values())
INFORMATION = {2: (0.6, 1.0), 4: (1.2, 2.0)}  # min_bits and free_bits: the solver is at most 1 or 2 bits


@dataclass(frozen=True)
class Task:
    solvers: int
    notation: str

    def problems(self, count: int, seed: int) -> "list[Problem]":
        rng = random.Random(seed)
        trees = ["".join(rng.sample(LETTERS, NODES)) for _ in range(count)]
        return [Problem(tree, rng.choice(tree), self) for tree in trees]


@dataclass(frozen=True)
class Problem:
    tree: str
    target: str
    task: Task

    @property
    def prompt(self) -> str:
        return f"{self.tree}?{self.target}:"

    def solution(self, solver: int) -> str:
        """The letters that a solver visits, up to the one that it looks for."""
        visits = [self.tree[node] for node in VISITS[solver][: BUDGETS[self.task.solvers]]]
        found = visits.index(self.target) + 1 if self.target in visits else len(visits)
        return SIGNS[self.task.notation][solver].join(visits[:found])

    def solved_by(self) -> list[int]:
        return [solver for solver in range(self.task.solvers) if self.solution(solver).endswith(self.target)]


def _visits(solver: int) -> list[int]:
    """The nodes in the order in which a solver visits them."""
    depth_first, mirrored = solver % 2 == 0, solver >= 2
    waiting, visited = [0], []
    while waiting:
        node = waiting.pop() if depth_first else waiting.pop(0)
        visited.append(node)
        children = [child for child in (2 * node + 1, 2 * node + 2) if child < NODES]
        waiting += children if mirrored == depth_first else children[::-1]
    return visited


VISITS = [_visits(solver) for solver in range(len(SOLVERS))]


def write_data(folder: Path, count: int, task: Task) -> None:
    """Saves `train.jsonl` and `validation.jsonl`."""
    for seed, (name, size) in enumerate({"train": count, "validation": HELD_OUT}.items()):
        rng = random.Random(seed)
        texts = [each.prompt + each.solution(rng.randrange(task.solvers)) for each in task.problems(size, seed + 10)]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))


def train(out: Path, kind: str, task: Task, overrides: Sequence[str]) -> Run:
    run = Run(out / kind)
    if (run.path / "model").is_dir():
        return run
    text, (min_bits, free_bits) = out / "text", INFORMATION[task.solvers]
    settings = {"model.kind": kind, "training.seq_len": SEQ_LEN, "training.batch_size": 96}
    settings |= {"data.train": f"[{text / 'train.jsonl'}]", "data.validation": f"[{text / 'validation.jsonl'}]"}
    if kind == "free":
        settings |= {"model.latent_dim": LATENT_DIM, "model.plan_span": SPAN, "model.aggregate_weight": 1}
        settings |= {"model.free_bits": free_bits, "model.min_bits": min_bits}
    settings |= dict(each.split("=", 1) for each in overrides)
    config = Path(__file__).parent.parent / "configs" / f"{'free_transformer' if kind == 'free' else 'baseline'}.yaml"
    command = [sys.executable, "-m", "free_transformer", "train", str(config), f"run_dir={run.path}"]
    subprocess.run([*command, *[f"{name}={value}" for name, value in settings.items()]], check=True)
    return run


@dataclass
class Sampler:
    """Solutions of problems by a model."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    temperature: float

    def tokens(self, problem: Problem) -> list[int]:
        return [begin_token(self.tokenizer), *encode(self.tokenizer, [problem.prompt])[0]]

    def solutions(
        self, wanted: Sequence[Problem], samples: int, plans: str | None = None, plan: Tensor | None = None
    ) -> list[list[str]]:
        """
        `samples` solutions of each problem.

        Args:
            plans: how the plans of the samples are sampled; None for a baseline or a given plan.
            plan: (problems, P, H).
        """
        found = []
        options: dict[str, object] = {} if plans is None else {"plans": plans}
        per_batch = max(1, 512 // samples)
        for start in range(0, len(wanted), per_batch):
            part = wanted[start : start + per_batch]
            tokens = torch.tensor([self.tokens(each) for each in part])
            if plan is not None:
                options["plan"] = plan[start : start + per_batch]
            output = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=SEQ_LEN - SPAN,
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                num_return_sequences=samples,
                **options,
            )
            texts = self.tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
            found += [texts[first : first + samples] for first in range(0, len(texts), samples)]
        return found


def solver_of(problem: Problem, text: str) -> int:
    """The solver whose solution a text is, or -1; the first one where several have the same."""
    return next((solver for solver in range(problem.task.solvers) if text == problem.solution(solver)), -1)


def passes(wanted: Sequence[Problem], texts: list[list[str]]) -> np.ndarray:
    """Whether each text finds the letter as one of the solvers would, (problems, samples) bool."""
    right = [{each.solution(solver) for solver in each.solved_by()} for each in wanted]
    return np.array([[text in allowed for text in row] for allowed, row in zip(right, texts, strict=True)])


def pass_at_k(passed: np.ndarray, k: int) -> tuple[float, float]:
    """
    Unbiased pass@k of independent samples (Chen et al. 2021, arXiv:2107.03374), and half of its 95 % confidence
    interval over problems.
    """
    samples, right = passed.shape[1], passed.sum(1)
    factors = 1 - k / np.arange(1, samples + 1)
    fails = [factors[samples - c :].prod() if samples - c >= k else 0.0 for c in right]
    return _estimate(1 - np.array(fails))


def pass_of_sets(passed: np.ndarray, k: int) -> tuple[float, float]:
    """The same for samples in sets of k."""
    return _estimate(passed.reshape(len(passed), -1, k).any(-1).mean(1))


def _estimate(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def solvers_of_plans(free: Sampler, task: Task, samples: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """
    The solvers that the solutions under each plan follow.

    Returns:
        (codes, solvers) counts, of problems whose solutions tell all solvers apart, and the plan of each code.
    """
    telling = [
        each
        for each in task.problems(2**LATENT_DIM * samples * 10, seed)
        if len({each.solution(s) for s in range(task.solvers)}) == task.solvers
    ]
    codes = codes_to_bits(torch.arange(2**LATENT_DIM), LATENT_DIM)
    counts = np.zeros((len(codes), task.solvers), dtype=int)
    for code, bits in enumerate(codes):
        part = telling[code * samples : (code + 1) * samples]
        for problem, texts in zip(part, free.solutions(part, 1, plan=_with_plan(free, part, bits)), strict=True):
            solver = solver_of(problem, texts[0])
            counts[code, solver] += solver >= 0
    return counts, codes


def _with_plan(free: Sampler, wanted: Sequence[Problem], bits: Tensor) -> Tensor:
    """The most likely plan of each problem, and a plan of its solution, (H,) or (problems, H): (problems, 2, H)."""
    read = free.model.infer_plan(torch.tensor([free.tokens(each) for each in wanted])) > 0
    return torch.cat([read[:, :1], bits.expand(len(wanted), -1)[:, None]], 1)


def measure(free: Sampler, baseline: Sampler, task: Task, count: int, samples: int) -> dict[str, object]:
    """pass@k, and which plan stands for which solver."""
    counts, codes = solvers_of_plans(free, task, samples, seed=1)
    used = np.repeat(np.indices(counts.shape).reshape(2, -1), counts.ravel(), axis=1)
    pool = [each for each in task.problems(20 * count, 2) if len(each.solved_by()) == 1][:count]
    best = counts.argmax(0)  # the plan of each solver
    oracle = codes[[best[each.solved_by()[0]] for each in pool]]
    sizes = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    of = {
        "baseline": baseline.solutions(pool, samples),
        "independent plans": free.solutions(pool, samples, "independent"),
        "oracle plan": free.solutions(pool, samples, plan=_with_plan(free, pool, oracle)),
    }
    curves = {name: {k: pass_at_k(passes(pool, texts), k) for k in sizes} for name, texts in of.items()}
    curves["stratified plans"] = {}
    for k in sizes:
        sets = [free.solutions(pool, k, "stratified") for _ in range(samples // k)]
        texts = [list(chain(*rows)) for rows in zip(*sets, strict=True)]
        curves["stratified plans"][k] = pass_of_sets(passes(pool, texts), k)
    return {
        "solvers": task.solvers,
        "notation": task.notation,
        "problems": len(pool),
        "samples": samples,
        "temperature": free.temperature,
        "plan_solver_bits": mutual_information(used[0], used[1]) if used.size else 0.0,
        "solvers_of_plans": counts.tolist(),
        "pass_at_k": curves,
    }


def table(result: dict) -> Table:
    names = ["baseline", "independent plans", "stratified plans", "oracle plan"]
    curves = result["pass_at_k"]
    rows = [
        [str(k), *[f"{curves[name][k][0]:.3f} ± {curves[name][k][1]:.3f}" for name in names]] for k in curves[names[0]]
    ]
    return Table(["k", *names], rows)


def main(
    out: Annotated[Path, typer.Option(help="Folder of texts, runs and results.")] = Path("runs/solvers"),
    solvers: Annotated[int, typer.Option(help="Number of solvers, 2 or 4.")] = 2,
    notation: Annotated[str, typer.Option(help="Sign between the letters of a solution: own or same.")] = "own",
    texts: Annotated[int, typer.Option(help="Number of training texts.")] = 100_000,
    count: Annotated[int, typer.Option(help="Number of problems, each solved by exactly one solver.")] = 200,
    samples: Annotated[int, typer.Option(help="Samples per problem.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    quick: Annotated[
        bool, typer.Option(help="Check that the script works: two steps of training, few samples.")
    ] = False,
    overrides: Annotated[str, typer.Option(help="Changes to the training settings, separated by spaces.")] = "",
) -> None:
    """Trains both models unless they exist, measures pass@k, and saves `pass_at_k.json` and `pass_at_k.md`."""
    task, changes = Task(solvers, notation), overrides.split()
    if quick:
        texts, count, samples = 200, 4, 4
        changes += ["training.max_steps=2", "training.batch_size=8", "model.hidden_dim=16", "model.num_heads=2"]
    if not (out / "text").is_dir():
        write_data(out / "text", texts, task)
    runs = [train(out, kind, task, changes) for kind in ("free", "baseline")]
    free, baseline = (Sampler(run.load_model().eval(), run.load_tokenizer(), temperature) for run in runs)
    torch.manual_seed(seed)
    result = measure(free, baseline, task, count, samples)
    write_text(out / "pass_at_k.json", json.dumps(result, indent=1) + "\n")
    write_text(out / "pass_at_k.md", table(result).to_markdown() + "\n")
    print(table(result).to_markdown())


if __name__ == "__main__":
    typer.run(main)
