"""The measurements of docs/diversity.md, with tiny untrained models."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import byte_tokenizer
from free_transformer.model.initialization import build_baseline


def byte_models(plan_span, latent_dim: int) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    shape = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 259, "max_seq_len": 64}
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = FreeTransformerConfig(**shape, **special, plan_span=plan_span, latent_dim=latent_dim)
    return {"free": FreeTransformer(config).eval(), "baseline": build_baseline(config).eval()}


def searched(tree: str, target: str, first_in: bool, mirrored: bool) -> str:
    """The letters that a search of a heap visits, by a list of paths instead of indices."""
    children = {path: tree[int("1" + path, 2) - 1] for length in range(4) for path in _paths(length)}
    order = sorted(children, key=lambda path: (len(path) if first_in else 0, path.translate(_flip(mirrored))))
    visited = ""
    for path in order:
        visited += children[path]
        if children[path] == target:
            break
    return visited


def _paths(length: int) -> list[str]:
    return [f"{number:0{length}b}" if length else "" for number in range(2**length)]


def _flip(mirrored: bool) -> dict[int, str]:
    return str.maketrans("01", "10") if mirrored else {}


@pytest.mark.parametrize(("solvers", "budget"), [(2, 8), (4, 5)])
def test_solvers_search_depth_first_and_breadth_first(benchmark_module, solvers, budget):
    bench = benchmark_module("solvers")
    seen = set()
    for problem in bench.Task(solvers, "same").problems(60, 0):
        for solver in range(solvers):
            whole = searched(problem.tree, problem.target, solver % 2 == 1, solver >= 2)
            assert problem.solution(solver) == whole[:budget]
            assert (solver in problem.solved_by()) == (len(whole) <= budget)
        seen.add(tuple(problem.solved_by()))
    assert {(solver,) for solver in range(solvers)} <= seen


def test_pass_at_k_is_the_mean_over_all_subsets(benchmark_module):
    bench = benchmark_module("solvers")
    passed = np.random.default_rng(0).random((5, 7)) < 0.3
    for k in (1, 2, 4, 7):
        exact = np.mean([[row[list(subset)].any() for subset in combinations(range(7), k)] for row in passed])
        assert bench.pass_at_k(passed, k)[0] == pytest.approx(exact)
    assert bench.pass_of_sets(passed[:, :6], 3)[0] == passed[:, :6].reshape(5, 2, 3).any(-1).mean()


def test_solvers_are_measured(benchmark_module):
    bench = benchmark_module("solvers")
    models = byte_models(bench.SPAN, bench.LATENT_DIM)
    free, baseline = (bench.Sampler(models[kind], byte_tokenizer(), 0.7) for kind in ("free", "baseline"))
    found = bench.measure(free, baseline, bench.Task(2, "own"), count=3, samples=4)
    assert np.array(found["solvers_of_plans"]).shape == (16, 2)
    assert {*found["pass_at_k"]} == {"baseline", "independent plans", "stratified plans", "oracle plan"}
    lines = bench.table(found).to_markdown().splitlines()
    assert len(lines) == 5 and "nan" not in "".join(lines)


def test_a_model_that_follows_its_plan_passes_with_stratified_plans(benchmark_module, monkeypatch):
    """Bit 0 of the second plan chooses the solver: two stratified samples solve what a single solver solves."""
    bench = benchmark_module("solvers")
    model = byte_models(bench.SPAN, bench.LATENT_DIM)["free"]
    tokenizer = byte_tokenizer()
    generate = model.generate

    def solve(tokens, **options):
        output = generate(tokens, return_dict_in_generate=True, **options)
        texts = tokenizer.batch_decode(output.sequences[:, : tokens.shape[1]], skip_special_tokens=True)
        answers = [
            bench.Problem(text[: bench.NODES], text[bench.NODES + 1], bench.Task(2, "own")).solution(int(plan[1, 0]))
            for text, plan in zip(texts, output.plan, strict=True)
        ]
        rows = [[256, *(text + answer).encode()] for text, answer in zip(texts, answers, strict=True)]
        return torch.tensor([row + [258] * (40 - len(row)) for row in rows])

    monkeypatch.setattr(model, "generate", solve)
    sampler = bench.Sampler(model, tokenizer, 1.0)
    found = bench.measure(sampler, sampler, bench.Task(2, "own"), count=20, samples=16)
    curves = found["pass_at_k"]
    assert found["plan_solver_bits"] == pytest.approx(1, abs=0.02)
    assert curves["stratified plans"][2] == (1.0, 0.0) and curves["oracle plan"][1] == (1.0, 0.0)
    assert 0.6 < curves["independent plans"][2][0] < 0.9


@pytest.mark.parametrize("command", ["modes", "styles", "curves"])
def test_diversity_is_measured(benchmark_module, monkeypatch, tmp_path, command):
    pytest.importorskip("sklearn")
    pytest.importorskip("sacrebleu")
    bench = benchmark_module("diversity")
    models = byte_models("sequence", 8)
    runs = {"free": models["free"], "baseline": models["baseline"], "reference": models["baseline"]}

    class LoadedRun:
        def __init__(self, path):
            self.load_model = lambda: runs[str(path)]
            self.load_tokenizer = byte_tokenizer

    monkeypatch.setattr(bench, "Run", LoadedRun)
    monkeypatch.setattr(bench, "_classifier", lambda *_: lambda texts: np.array([len(text) % 3 for text in texts]))
    options = {
        "modes": {"repeats": 50},
        "styles": {"free": "free", "baseline": "baseline", "quick": True},
        "curves": {"free": "free", "baseline": "baseline", "reference": "reference", "quick": True},
    }
    getattr(bench, command)(out=tmp_path, **options[command])
    result = json.loads((tmp_path / f"{command}.json").read_text())
    text = (tmp_path / f"{command}.md").read_text()
    assert result and text.count("|") > 20  # random bytes may have no pairs of words
