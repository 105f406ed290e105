"""`evaluate`, `compare` and `plan`."""

import errno
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import BITS, KINDS, assert_refused, everything_below
from cli_fixtures import *  # noqa: F403

from free_transformer.evaluation import likelihood
from free_transformer.files import write_text
from free_transformer.runs.evaluate import EvaluationOptions, compare_runs, evaluate_run
from free_transformer.training import Run


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_measures_and_writes_the_names_of_the_library(command, runs, kind):
    outcome = command("evaluate", runs[kind], "--num-plans", 8, "--max-rows", 20)
    assert outcome.status == 0, outcome
    values = json.loads((runs[kind] / "metrics.json").read_text())
    assert {"reconstruction", "kl", "elbo", "nll", "prior", "tokens", "standard_errors", "usage"} <= values.keys()
    assert values["documents"] == 20
    assert values["bytes_per_token"] == pytest.approx(1.0, abs=0.05)
    assert 0 < values["nll"] < math.log(259)
    if kind == "free":
        assert values["nll"] <= values["elbo"] + 1e-6
        assert len(values["usage"]["bits_per_position"]) == BITS
        for name in ("reconstruction", "elbo", "nll", "prior", "gap", "live bits", "nats per byte"):
            assert name in outcome.out
    else:
        assert values["kl"] is values["elbo"] is values["usage"] is values["warning"] is None


def test_evaluate_says_when_the_plan_is_not_used(command, run):
    model = Run(run).load_model()
    torch.nn.init.zeros_(model.plan_table.weight)
    model.save_pretrained(run / "model")
    outcome = command("evaluate", run, "--num-plans", 1, "--max-rows", 8)
    verdict = " ".join(outcome.out.split("saved to")[-1].split())
    assert "The plan is not used: a random plan predicts as well" in verdict
    assert "Next: train longer, " in verdict and "kl_weight" not in verdict and "plan_span" not in verdict
    assert "not used" in json.loads((run / "metrics.json").read_text())["warning"]


def test_evaluate_is_repeatable_and_takes_other_text_and_the_exact_method(command, run, tmp_path):
    write_text(tmp_path / "other.txt", "mats and cats. " * 20)
    measured = []
    for _ in range(2):
        outcome = command("evaluate", run, "--data", tmp_path / "other.txt", "--method", "exact", "--seed", 3)
        assert outcome.status == 0, outcome
        measured.append(json.loads((run / "metrics.json").read_text()))
    assert measured[0] == measured[1]
    assert measured[0]["method"] == "exact"
    assert measured[0]["tokens"] == 15 * 20 + 1  # end-of-text counts


@pytest.mark.parametrize("command_name", ["evaluate", "generate"])
def test_plans_may_come_from_the_aggregate_prior(command, run, command_name):
    options = {"evaluate": ["--max-rows", 8, "--method", "particle_filter"], "generate": ["--max-new-tokens", 3]}
    outcome = command(command_name, run, "--prior", "aggregate", "--num-samples", 2, *options[command_name])
    assert outcome.status == 0, outcome
    if command_name == "evaluate":
        measured = json.loads((run / "metrics.json").read_text())
        assert (measured["plan_prior"], measured["method"]) == ("aggregate", "particle_filter")
    assert_refused(command("generate", run, "--prior", "flat"), 2, "prior='flat': one of")


def test_plan_shows_what_each_bit_does(command, runs):
    outcome = command("plan", runs["free"], "--max-rows", 8, "--max-new-tokens", 5, "--prompt", "a c")
    assert outcome.status == 0, outcome
    for bit in range(BITS):
        assert f"bit {bit} = 0, plan" in outcome.out and f"bit {bit} = 1, plan" in outcome.out
    assert outcome.out.count("\na c") == 2 * BITS
    again = command("plan", runs["free"], "--max-rows", 8, "--max-new-tokens", 5, "--prompt", "a c")
    assert again.out == outcome.out
    fixed = command("plan", runs["free"], "--max-rows", 8, "--max-new-tokens", 5, "--plan", "1" * BITS)
    assert f"plan {'1' * BITS}" in fixed.out
    assert_refused(command("plan", runs["baseline"]), 2, "a baseline has no plan")
    assert_refused(command("plan", runs["free"], "--plan", "12"), 2, "give its bits as 0 and 1")


def test_metrics_of_one_text_are_json_that_any_reader_takes(command, run, tmp_path):
    write_text(tmp_path / "one.txt", "a cat")
    assert command("evaluate", run, "--data", tmp_path / "one.txt", "--num-plans", 1).status == 0

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    json.loads((run / "metrics.json").read_text(), parse_constant=refuse)


def test_compare_shows_what_may_be_compared(command, runs):
    outcome = command("compare", runs["free"], runs["baseline"], "--method", "exact", "--max-rows", 20)
    assert outcome.status == 0, outcome
    values = json.loads((runs["free"] / "comparison.json").read_text())
    assert values["difference"] == pytest.approx(values["nll"] - values["baseline_nll"])
    assert values["standard_error"] > 0
    assert values["elbo_difference"] >= values["difference"] - 1e-6
    assert "nll, baseline" in outcome.out
    assert "reconstruction" not in outcome.out


@pytest.mark.parametrize("order", [("baseline", "free"), ("free", "free"), ("baseline", "baseline")])
def test_compare_takes_a_free_run_and_a_baseline(command, runs, order):
    outcome = command("compare", *(runs[kind] for kind in order), "--num-plans", 1, "--max-rows", 4)
    assert outcome.status == 2
    assert "compare needs a Free Transformer" in outcome.err


def test_compare_refuses_runs_of_different_row_length(command, runs, tmp_path):
    other = Path(shutil.copytree(runs["baseline"], tmp_path / "other"))
    text = (other / "config.yaml").read_text()
    write_text(other / "config.yaml", text.replace("seq_len: 16", "seq_len: 12"))
    outcome = command("compare", runs["free"], other, "--num-plans", 1, "--max-rows", 8)
    assert outcome.status == 2
    assert "different text" in outcome.err


def test_compare_refuses_runs_of_different_tokenizers(command, runs, tmp_path):
    """Rows of as many tokens are not the same text, nor is a nat per token the same thing."""
    other = Path(shutil.copytree(runs["baseline"], tmp_path / "other"))
    assert command("tokenizer", runs["free"].parent / "text.txt", tmp_path / "bpe", "--vocab-size", 259).status == 0
    shutil.copytree(tmp_path / "bpe", other / "model", dirs_exist_ok=True)
    outcome = command("compare", runs["free"], other, "--num-plans", 1, "--max-rows", 8)
    assert outcome.status == 2, outcome.out
    assert "different" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--method", "guess"], "method='guess'"),
    ],
)
def test_evaluate_refuses_what_it_cannot_use(command, run, options, message):
    outcome = command("evaluate", run, "--max-rows", 4, *options)
    assert outcome.status == 2
    assert re.search(f"^free-transformer: error: .*{message}", outcome.err, flags=re.M)
    assert "Traceback" not in outcome.err
    assert not (run / "metrics.json").exists()


def test_evaluate_without_held_out_text_asks_for_some(command, run):
    settings = Run(run).settings
    settings.data.validation = []
    Run(run).write_config(settings)
    assert_refused(command("evaluate", run), 2, "data.validation is empty; pass held-out text with --data")


def test_a_run_without_a_model_yet_is_refused(command, run):
    shutil.rmtree(run / "model")
    assert_refused(command("evaluate", run), 2, "has no model yet")


def test_a_full_disk_is_status_1(command, run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("free_transformer.files.write_text", full)
    outcome = command("evaluate", run, "--max-rows", 2, "--num-plans", 1)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1] == "free-transformer: error: No space left on device"


@pytest.mark.parametrize("option", ["--num-plans", "--num-samples"])  # the second one is its old name
def test_evaluation_samples_the_given_number_of_plans(command, run, monkeypatch, option):
    seen = []
    original = likelihood._evaluate_batch

    def watch(model, batch, num_samples, method, prior):
        seen.append((len(batch["input_ids"]), num_samples, method))
        return original(model, batch, num_samples, method, prior)

    monkeypatch.setattr(likelihood, "_evaluate_batch", watch)
    assert command("evaluate", run, option, 3, "--max-rows", 10, "--batch-size", 4).status == 0
    assert seen == [(4, 3, "importance"), (4, 3, "importance"), (2, 3, "importance")]


def test_evaluate_run_returns_what_the_command_saves(command, run):
    assert command("evaluate", run, "--max-rows", 10, "--num-plans", 2, "--seed", 5).status == 0
    saved = json.loads((run / "metrics.json").read_text())
    before = everything_below(run)
    result = evaluate_run(Run(run), EvaluationOptions(max_rows=10, num_samples=2, seed=5), quiet=True)
    assert everything_below(run) == before
    assert (result.likelihood.nll, result.bytes_per_token) == (saved["nll"], saved["bytes_per_token"])
    assert result.likelihood.elbo == saved["elbo"]
    other = evaluate_run(Run(run), EvaluationOptions(max_rows=10, num_samples=2, seed=6), quiet=True)
    assert other.likelihood.nll != saved["nll"]


def test_compare_runs_returns_what_the_command_saves(command, runs):
    assert command("compare", runs["free"], runs["baseline"], "--method", "exact", "--max-rows", 10).status == 0
    saved = json.loads((runs["free"] / "comparison.json").read_text())
    options = EvaluationOptions(method="exact", max_rows=10)
    result = compare_runs(Run(runs["free"]), Run(runs["baseline"]), options, quiet=True)
    assert vars(result.comparison) == {name: saved[name] for name in vars(result.comparison)}
