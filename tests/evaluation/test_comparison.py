"""The comparison with a Llama and the public implementations: counts, and handling of responses."""

import json
import sys

import pytest
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode

TINY = {"width": 16, "layers": 2, "heads": 2, "ffn": 24, "bits": 3, "length": 16, "batch": 2}


@pytest.fixture
def bench(benchmark_module):
    return benchmark_module("comparison")


@pytest.fixture
def report(benchmark_module):
    return benchmark_module("comparison_report")


@pytest.fixture
def contestants(benchmark_module):
    return benchmark_module("contestants")


class Answers:
    """In the place of a worker: answers with the seconds in its specification, one a turn."""

    def __init__(self, name, spec):
        self.spec, self.turns = spec, iter(spec["seconds"])

    def ask(self, limit=90.0, **request):
        found = next(self.turns)
        if isinstance(found, Exception):
            raise found
        return {"seconds": found}

    def close(self):
        pass


def group(bench, **seconds):
    specs = {label: ("Llama", {"seconds": taken}) for label, taken in seconds.items()}
    return bench.Group("a group", specs, {"do": "train"}, rounds=3)


def test_ratios_are_of_turns_of_one_round_after_one_to_warm_up(bench, report, monkeypatch):
    monkeypatch.setattr(bench, "Worker", Answers)
    found = group(bench, Llama=[9.0, 1.0, 2.0, 4.0], Ours=[9.0, 0.5, 1.0, 8.0])
    found.run(Progress(disable=True))
    results = {"seconds": found.seconds}
    assert report.ratios(results, "Ours") == [0.5, 0.5, 2.0]
    assert report.ratios(results, "Ours", faster_is_more=True) == [2.0, 2.0, 0.5]
    assert report.spread([0.5, 0.5, 2.0]) == "**0.50** (0.50–2.00)"


def test_a_failed_contestant_is_listed_and_a_slow_one_takes_one_turn(bench, report, monkeypatch):
    monkeypatch.setattr(bench, "Worker", Answers)
    found = group(bench, Llama=[1.0] * 4, Slow=[50.0], Broken=[1.0, bench.Failed("RuntimeError: no")])
    found.run(Progress(disable=True))
    assert found.failed == {"Broken": "RuntimeError: no"}
    assert found.seconds == {"Llama": [None, 1.0, 1.0, 1.0], "Slow": [50.0, None, None, None]}
    assert report.ratios({"seconds": found.seconds}, "Slow") == [50.0]


def test_a_worker_responds_or_gives_the_reason(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(bench.Failed, match="no environment: make bench prepares it"):
        bench.Worker("Llama", TINY)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    script = "import sys; print('{}', flush=True); sys.stdin.readline(); raise ValueError('odd heads')"
    (tmp_path / "contestants.py").write_text(script)
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    worker = bench.Worker("Llama", TINY)
    with pytest.raises(bench.Failed, match="ValueError: odd heads"):
        worker.ask(do="train")
    worker.close()
    (tmp_path / "contestants.py").write_text("print('{}', flush=True); import time; time.sleep(60)")
    worker = bench.Worker("Llama", TINY)
    with pytest.raises(bench.Failed, match="no response within 0 s"):
        worker.ask(0.01, do="train")


def test_a_part_that_is_measured_again_takes_its_place_in_order(bench):
    before = [{"title": "c"}, {"title": "b", "old": 1}, {"title": "no longer measured"}]
    found = bench.merged(bench.merged(before, {"title": "b"}, list("abc")), {"title": "a"}, list("abc"))
    assert found == [{"title": "a"}, {"title": "b"}, {"title": "c"}]


@pytest.mark.parametrize("name", ["Llama", "Free"])
def test_a_contestant_trains_generates_and_counts(contestants, name):
    contestant = contestants.CONTESTANTS[name](TINY)
    for request in ({"do": "train"}, {"do": "generate", "batch": 2, "new": 3, "prompt": 4}):
        assert contestants.answer(contestant, request, 0)["seconds"] > 0
    counted = contestants.answer(contestant, {"do": "count"}, 0)
    assert counted["parameters"] == sum(each.numel() for each in contestant.model.parameters())
    assert counted["table"] == (0 if name == "Llama" else 2**3 * 16)


@pytest.mark.parametrize(("label", "free", "plans"), [("Llama", False, 0), ("Free", True, 1), ("Free", True, 128)])
def test_operations_are_those_that_torch_counts(bench, report, contestants, label, free, plans):
    spec = {**bench.SMALL, "bits": 1, "length": 128, "batch": 1, "span": 1 if plans == 128 else "sequence"}
    contestant = contestants.CONTESTANTS[label](spec)
    contestant.model.set_attn_implementation("eager")  # the fused kernel of a CPU is not counted by torch
    with FlopCounterMode(display=False) as counter:
        contestant.train_step()
    # Eager attention computes the masked half as well, but its products once: 12 T² D of 14 T² D, and of 7 causal.
    square = 128 * 256
    eager = counter.get_total_flops() - 5 * 6 * 128 * square + (2 * plans * square if free else 0)
    assert report.operations("6 layers of width 256, 1 x 128 tokens", free, plans) == pytest.approx(eager, rel=0.01)


def test_the_report_replaces_what_is_marked_and_nothing_else(report, monkeypatch, tmp_path):
    for name, path in (("PAGE", tmp_path / "page.md"), ("PLOTS", tmp_path)):
        monkeypatch.setattr(report, name, path)
    names = ("training", "generation", "memory", "curves")
    page = "".join(f"before {name}\n<!-- bench {name} -->\nold\n<!-- end -->\n" for name in names)
    (tmp_path / "page.md").write_text(page + "after\n")
    seconds = {"Llama": [None, 2.0, 2.0], "free-transformer 0.1.2": [None, 1.0, 3.0]}
    timed = {"seconds": seconds, "failed": {"x-transformers": "killed: out of memory"}}
    points = [{"x": x, "seconds": x**2 / 100, "operations": 2.0 * x} for x in (1, 2, 8)]
    peaks = {"Llama": {"peak": 4e6, "table": 0}, "Ours": {"peak": 6e6, "table": 2e6}}
    results = {
        "rates": {"training": [{"float32": 1e11}, {"float32": 1e11}]},
        "training": [{"title": "6 layers of width 256, 8 x 256 tokens, H = 8", **timed}],
        "generation": [{"title": "6 layers of width 256, H = 8, batch 8", **timed}],
        "memory": [{"title": "a", "bytes": peaks, "failed": {}}],
        "curves": [{"title": f"{each}, by bits", "points": points} for each in "ab"],
    }
    for part in ("training", "memory"):
        report.write_report({key: value for key, value in results.items() if key in (part, "rates")})
    written = (tmp_path / "page.md").read_text()
    assert "| 6 layers of width 256, 8 x 256 tokens, H = 8 | **1.00** (0.50–1.50) | failed |" in written
    assert "| 6 layers of width 256, 8 x 256 tokens, H = 8 | 1,024 (38 %) | 1,024 (44 %) | failed |" in written
    assert "x-transformers failed: killed: out of memory." in written
    assert "| a | **1.00** |" in written and "| a | 4 (1.00) | 6 (1.50) |" in written
    assert written.count("old") == 2 and written.endswith("after\n")
    report.write_report(results)
    written = (tmp_path / "page.md").read_text()
    assert "1,024 tokens/s" in written and "old" not in written
    assert "| a, by bits | **2.00** | 1.00 | **2.00** | 1.00 |" in written
    assert "| a, by bits | 1: 10.0, 2: 40.0, 8: 640.0 |" in written
    assert {path.name for path in tmp_path.glob("*.png")} == {"training.png", "generation.png", "curves.png"}


def test_curves_have_points_at_every_size_and_exponents_of_their_times(benchmark_module, monkeypatch):
    curves = benchmark_module("cost_curves")
    points = [{"seconds": 3.0 * x**1.5, "x": x} for x in (1, 2, 8)]
    assert curves.exponent(points, "seconds") == pytest.approx(1.5)
    monkeypatch.setitem(curves.SHAPE, "hidden_dim", 16)
    monkeypatch.setattr(curves, "LENGTHS", [8, 16])
    monkeypatch.setattr(curves, "SPANS", [1, 4])
    for names in ("EXACT_BITS", "SAMPLED_BITS", "GROUPED_BITS"):
        monkeypatch.setattr(curves, names, [2, 4])
    found = [curves.measure(curve, 1) for curve in curves.curves()]
    assert [[point["x"] for point in curve["points"]] for curve in found] == [
        *([8, 16], [4, 16], [2, 4], [2, 4]),
        [64, 256],
    ]
    assert all(point["seconds"] > 0 and point["operations"] > 0 for curve in found for point in curve["points"])
    json.dumps(found)
