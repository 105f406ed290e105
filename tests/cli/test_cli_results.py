"""`report`, `watch` and `export`."""

import shutil
from pathlib import Path

import pytest
from cli_cases import BITS, KINDS, assert_refused
from cli_fixtures import *  # noqa: F403

from free_transformer.files import write_text


@pytest.mark.parametrize("kind", KINDS)
def test_report_opens_without_a_server_or_a_network(command, runs, tmp_path, kind, outside_references):
    run = Path(shutil.copytree(runs[kind], tmp_path / "run <b>"))
    command("evaluate", run, "--num-plans", 1, "--max-rows", 4)
    outcome = command("report", run)
    assert outcome.status == 0, outcome
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<svg" in page and "Held-out text" in page and "hidden_dim: 16" in page
    assert "Run run &lt;b&gt;" in page
    assert not outside_references(page)


def test_report_of_a_run_that_was_not_evaluated_has_its_curves(command, runs, tmp_path):
    run = Path(shutil.copytree(runs["free"], tmp_path / "run"))
    (run / "metrics.json").unlink(missing_ok=True)
    assert command("report", run).status == 0
    assert "Curves" in (run / "report.html").read_text()


def test_watch_and_report_of_runs(command, runs, tmp_path):
    both = [str(path) for path in runs.values()][:2]
    outcome = command("watch", *both, "--once")
    assert outcome.status == 0 and "gradient norm" in outcome.out
    page = tmp_path / "page.html"
    outcome = command("report", *both, "--out", page)
    assert outcome.status == 0 and page.read_text().count("<svg") >= 1
    assert_refused(command("watch", tmp_path / "none", "--once"), 2, "not a run")


@pytest.mark.parametrize("scheme", ["int8-weight", "int8-dynamic"])
def test_export_quantizes_and_generate_uses_it(command, run, scheme):
    done = command("export", run, "--to", "torch", "--quantize", scheme)
    folder = run / f"torch-{scheme}"
    assert done.status == 0 and f"MB, saved to {folder}" in done.out
    written = command("generate", folder, "--prompt", "the ", "--max-new-tokens", 5)
    assert written.status == 0 and "the " in written.out


def test_export_writes_graphs_that_generate_takes(command, run):
    done = command("export", run, "--static", 1, 16, "--out", run / "graphs")
    assert done.status == 0
    for line in ("training │ plan_logits", "decode   │ logits", "1 x 16"):
        assert line in done.out
    options = ("--prompt", "the ", "--max-new-tokens", 5, "--temperature", 0, "--plan", "1" * BITS)
    assert (
        command("generate", run / "graphs", *options).out.splitlines()[1:]
        == (command("generate", run, *options).out.splitlines()[1:])
    )
    assert command("generate", run / "graphs", "--max-new-tokens", 100).status == 0  # read again every 8 tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tensorflow"], "--to tensorflow: onnx, torch or aot"),
        (["--to", "torch"], "--to torch is for --quantize"),
        (["--to", "aot"], "--to aot needs --static BATCH LENGTH"),
        (["--quantize", "int3"], "quantize='int3': one of"),
        (["--static", "0", "8"], "at least 1 text, and from 4 to 16 tokens"),
    ],
)
def test_export_refuses_what_it_cannot_write(command, run, options, message):
    done = command("export", run, *options)
    assert done.status == 2 and message in done.err


def test_export_refuses_a_baseline(command, runs):
    done = command("export", runs["baseline"])
    assert done.status == 2 and "LlamaForCausalLM has no plan" in done.err


def test_nothing_of_others_is_replaced(command, run, tmp_path):
    for name in ("notes.txt", "page.html", "results.json"):
        write_text(tmp_path / "desk" / name, "mine")
    small = ("--to", "torch", "--quantize", "int8-dynamic", "--out")
    assert_refused(command("export", run, *small, tmp_path / "desk"), 2, "not of an earlier export")
    for own in (run, run / "model", run.parent):
        assert_refused(command("export", run, *small, own, "--overwrite"), 2, "holds what is being read")
    assert_refused(
        command("report", run, "--out", tmp_path / "desk" / "page.html"), 2, "was not written by this command"
    )
    done = command("lm-eval", run, "--tasks", "x", "--output", tmp_path / "desk" / "results.json")
    assert_refused(done, 2, "was not written by this command")
    assert {file.read_text() for file in (tmp_path / "desk").iterdir()} == {"mine"}
    write_text(run / "metrics.json", '{"mine": 1}')
    assert_refused(command("evaluate", run), 2, "metrics.json: not a results file of this command")
    assert (run / "metrics.json").read_text() == '{"mine": 1}'
    (run / "metrics.json").unlink()
    for _ in range(2):  # of an earlier export, page or sweep it may be
        assert command("export", run, *small, tmp_path / "small").status == 0
        assert command("report", run, "--out", tmp_path / "page.html").status == 0
    assert command("report", run, "--out", tmp_path / "desk" / "page.html", "--overwrite").status == 0
