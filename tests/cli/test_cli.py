import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from free_transformer.cli.main import main
from free_transformer.data import load_tokenizer
from free_transformer.evaluation import likelihood
from free_transformer.files import write_text
from free_transformer.settings import Settings, parse_settings
from free_transformer.training import Run, step, train

KINDS = ["free", "baseline"]
BITS = 3
TEXT = "".join(f"the cat number {i} sat on a mat. a dog ran home again. " for i in range(30))


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def command(monkeypatch, capsys):
    """`free-transformer ...` in this process, its exit status and what it wrote."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["free-transformer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A free run and a baseline of twenty steps, `free_bits` high enough for a posterior that spends bits."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text.txt", TEXT)
    return {kind: train(tiny_settings(folder, kind), quiet=True).path for kind in KINDS}


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the free run, for a test that writes into it."""
    return Path(shutil.copytree(runs["free"], tmp_path / "copy", ignore=shutil.ignore_patterns("metrics.json")))


def tiny_settings(folder: Path, kind: str) -> Settings:
    model = {"kind": kind, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "latent_dim": BITS}
    training = {"max_steps": 20, "batch_size": 4, "seq_len": 16, "log_every": 5, "eval_every": 10, "device": "cpu"}
    training["prior_rows"] = 32  # gathering plans of the default 1,024 rows takes a second per run
    text = [str(folder / "text.txt")]
    return parse_settings(
        {
            "run_dir": str(folder / kind),
            "model": model,
            "training": {**training, "learning_rate": 1e-2, "warmup_steps": 2, "eval_rows": 8},
            "data": {"train": text, "validation": text},
            "logging": {"tensorboard": False, "sample_every": 0, "sample_tokens": 4},
        }
    )


@pytest.fixture
def config(tmp_path) -> Path:
    """A file of settings for a run in `tmp_path / "free"`."""
    write_text(tmp_path / "text.txt", TEXT)
    settings = tiny_settings(tmp_path, "free")
    write_text(tmp_path / "config.yaml", settings.to_yaml())
    return tmp_path / "config.yaml"


def assert_refused(outcome: Outcome, status: int, message: str) -> None:
    """The exit status, and one clear line on standard error."""
    assert outcome.status == status, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("free-transformer: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in outcome.out + outcome.err


def texts_of(outcome: Outcome) -> list[str]:
    """What stands under each sample's title."""
    assert outcome.status == 0, outcome
    return [part.split("\n", 1)[1] for part in re.split(r"^(?=sample \d+)", outcome.out, flags=re.M)[1:]]


def everything_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_train_writes_a_run_and_its_report(command, config, tmp_path):
    outcome = command("train", config, "training.max_steps=3", "model.latent_dim=2", f"run_dir={tmp_path / 'new'}")
    assert outcome.status == 0, outcome
    files = {path.name for path in (tmp_path / "new").iterdir() if not path.name.startswith(".")}
    assert files == {"config.yaml", "metrics.jsonl", "history.jsonl", "checkpoints", "model", "report.html"}
    assert str(tmp_path / "new" / "report.html") in outcome.out
    settings = Run(tmp_path / "new").settings
    assert (settings.training.max_steps, settings.model.latent_dim) == (3, 2)


def test_train_goes_on_with_a_run_and_says_so(command, config, tmp_path):
    command("train", config, "training.max_steps=2")
    outcome = command("train", config, "training.max_steps=4")
    assert "resumed at step 2" in outcome.err
    assert [line["step"] for line in Run(tmp_path / "free").read_metrics() if line["split"] == "train"] == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_measures_and_writes_the_names_of_the_library(command, runs, kind):
    outcome = command("evaluate", runs[kind], "--num-samples", 8, "--max-rows", 20)
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
    outcome = command("evaluate", run, "--num-samples", 1, "--max-rows", 8)
    assert "warning: the plan is not used" in " ".join(outcome.out.split())
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
    assert_refused(command("plan", runs["free"], "--plan", "12"), 2, "write its bits as 0 and 1")


def test_metrics_of_one_text_are_json_that_any_reader_takes(command, run, tmp_path):
    write_text(tmp_path / "one.txt", "a cat")
    assert command("evaluate", run, "--data", tmp_path / "one.txt", "--num-samples", 1).status == 0

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
    outcome = command("compare", *(runs[kind] for kind in order), "--num-samples", 1, "--max-rows", 4)
    assert outcome.status == 2
    assert "compare takes a run of kind free, then one of kind baseline" in outcome.err


def test_compare_refuses_runs_of_different_row_length(command, runs, tmp_path):
    other = Path(shutil.copytree(runs["baseline"], tmp_path / "other"))
    text = (other / "config.yaml").read_text()
    write_text(other / "config.yaml", text.replace("seq_len: 16", "seq_len: 12"))
    outcome = command("compare", runs["free"], other, "--num-samples", 1, "--max-rows", 8)
    assert outcome.status == 2
    assert "different text" in outcome.err


def test_compare_refuses_runs_of_different_tokenizers(command, runs, tmp_path):
    """Rows of as many tokens are not the same text, nor is a nat per token the same thing."""
    other = Path(shutil.copytree(runs["baseline"], tmp_path / "other"))
    assert command("tokenizer", runs["free"].parent / "text.txt", tmp_path / "bpe", "--vocab-size", 259).status == 0
    shutil.copytree(tmp_path / "bpe", other / "model", dirs_exist_ok=True)
    outcome = command("compare", runs["free"], other, "--num-samples", 1, "--max-rows", 8)
    assert outcome.status == 2, outcome.out
    assert "different" in outcome.err


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_writes_the_same_text(command, runs, kind):
    first, again, other = (
        texts_of(command("generate", runs[kind], "--num-samples", 2, "--max-new-tokens", 12, "--seed", seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 2
    assert first[0] != first[1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_temperature_is_the_likeliest_text_whatever_the_seed(command, runs, kind):
    options = ["--temperature", 0, "--max-new-tokens", 8, "--prompt", "the c", *(["--plan", "010"] * (kind == "free"))]
    one, other = (texts_of(command("generate", runs[kind], *options, "--seed", seed)) for seed in (1, 2))
    assert one == other
    assert one[0].startswith("the c")


def test_text_is_written_under_the_plan_given_and_shows_it(command, runs):
    outcome = command("generate", runs["free"], "--plan", "1 0,1", "--num-samples", 3, "--max-new-tokens", 4)
    assert outcome.out.count("plan 101") == 3
    shown = [
        re.findall(r"plan ([01]+)", command("generate", runs["free"], "--num-samples", 8, "--seed", 5).out)
        for _ in range(2)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 8
    assert len(set(shown[0])) > 1


def test_text_is_written_under_the_plan_of_an_example(command, runs, tmp_path):
    write_text(tmp_path / "example.txt", "the cat sat")
    model, tokenizer = Run(runs["free"]).load_model(), load_tokenizer("bytes")
    bits = model.infer_plan(torch.tensor([tokenizer("the cat sat")["input_ids"]]))[0, 0] > 0
    expected = "".join("01"[bit] for bit in bits.int().tolist())
    outcome = command("generate", runs["free"], "--plan-from", tmp_path / "example.txt", "--max-new-tokens", 4)
    assert f"plan {expected}" in outcome.out


@pytest.mark.parametrize("kind", KINDS)
def test_stream_writes_the_same_text_as_at_once(command, runs, kind):
    options = ["generate", runs[kind], "--prompt", "a dog", "--max-new-tokens", 10, "--seed", 4]
    streamed = command(*options, "--stream")
    assert streamed.status == 0
    assert streamed.out.strip() == texts_of(command(*options))[0].strip()


def test_prompt_of_markup_and_other_scripts_comes_out_as_it_went_in(command, runs):
    prompt = "[bold]é 🙂[/]"
    assert texts_of(command("generate", runs["free"], "--prompt", prompt, "--max-new-tokens", 1))[0].startswith(prompt)


def test_generate_takes_a_folder_that_save_pretrained_has_written(command, runs):
    one, other = (
        texts_of(command("generate", folder, "--max-new-tokens", 6))
        for folder in (runs["free"], runs["free"] / "model")
    )
    assert one == other


@pytest.mark.parametrize("kind", KINDS)
def test_report_opens_without_a_server_or_a_network(command, runs, tmp_path, kind, outside_references):
    run = Path(shutil.copytree(runs[kind], tmp_path / "run <b>"))
    command("evaluate", run, "--num-samples", 1, "--max-rows", 4)
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


def test_tokenizer_is_trained_saved_and_used(command, config, tmp_path):
    outcome = command("tokenizer", tmp_path / "text.txt", tmp_path / "bpe", "--vocab-size", 300)
    assert outcome.status == 0, outcome
    assert f"data.tokenizer={tmp_path / 'bpe'}" in outcome.out
    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    assert tokenizer.decode(tokenizer.encode("the cat 🙂"), skip_special_tokens=True) == "the cat 🙂"
    assert command("train", config, f"data.tokenizer={tmp_path / 'bpe'}", "training.max_steps=1").status == 0
    assert Run(tmp_path / "free").load_model().config.vocab_size == len(tokenizer) <= 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["only.txt"], "name the text to train on, then the folder to write"),
        (["nowhere.txt", "out"], "nowhere.txt: no such file"),
        (["text.txt", "out", "--vocab-size", 258], "vocab_size=258: at least 259"),
        (["text.txt", "text.txt"], "holds what is being read"),
        (["table.jsonl", "out", "--column", "body"], r"no column 'body'.*'text'"),
    ],
)
def test_tokenizer_refuses_what_it_cannot_use_and_writes_nothing(command, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_text(Path("text.txt"), TEXT)
    write_text(Path("table.jsonl"), '{"text": "a"}\n')
    before = everything_below(tmp_path)
    assert_refused(command("tokenizer", *options), 2, message)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rat=1"], "unknown setting 'training.learning_rat': did you mean 'learning_rate'"),
        (["model.latent_dims=1"], "unknown setting 'latent_dims': did you mean 'latent_dim'"),
        (["training.max_steps=many"], r"training\.max_steps='many'"),
        (["training.precision=fp16", "training.device=cpu"], "it is for GPUs without bf16"),
        (["model.num_heads=3"], "hidden_dim=16 is not a multiple of num_heads=3"),
        (["model.num_heads=16"], "heads of 1: rotary positions need an even size"),
        (["data.train=[nowhere.txt]"], "nowhere.txt: no such file"),
        (["data.tokenizer=nowhere"], "tokenizer 'nowhere'"),
        (["training.batch_size=10000"], "fewer than batch_size=10000"),
        (["nonsense"], "an override is section.name=value"),
        (["training.device=cuda:99"], "not on this machine"),
    ],
)
def test_settings_that_are_refused_write_nothing(command, config, tmp_path, overrides, message):
    before = everything_below(tmp_path)
    assert_refused(command("train", config, *overrides), 2, message)
    assert everything_below(tmp_path) == before
    assert not (tmp_path / "free").exists()


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"\xff\xfe"])
def test_text_that_is_none_is_refused_by_name_and_nothing_is_written(command, config, tmp_path, content):
    (tmp_path / "bad.txt").write_bytes(content)
    outcome = command("train", config, f"data.train=[{tmp_path / 'bad.txt'}]")
    assert_refused(outcome, 2, r"bad\.txt: (there is no text|not)")
    assert not (tmp_path / "free").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"model: [", "not YAML"),
        (b"just words", "sections of settings"),
        (b"\xff\xff", "as text"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(command, tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    assert_refused(command("train", path), 2, rf"config\.yaml: .*{message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "0102"], "write its bits as 0 and 1"),
        (["--plan", ""], "write its bits as 0 and 1"),
        (["--plan", "0101"], "has 4 bits: a plan of this model has 3"),
        (["--plan", "010101"], "2 plans.*takes one"),
        (["--plan", "010", "--plan-from", "example.txt"], "not both"),
        (["--plan-from", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--plan-from", "nowhere"], "nowhere"),
        (["--prompt-plan", "guess"], "prompt_plan='guess'"),
        (["--stream", "--num-samples", 2], "use --num-samples 1"),
    ],
)
def test_generate_refuses_what_it_cannot_use(command, runs, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_text(Path("example.txt"), "the cat")
    assert_refused(command("generate", runs["free"], "--max-new-tokens", 2, *options), 2, message)


@pytest.mark.parametrize("options", [["--plan", "010"], ["--plan-from", "text.txt"]])
def test_a_baseline_has_no_plan(command, runs, options):
    assert_refused(command("generate", runs["baseline"], *options), 2, "a baseline has no plan")


@pytest.mark.parametrize("name", ["evaluate", "generate", "report", "compare"])
def test_a_folder_that_is_no_run_is_refused_and_stays_empty(command, tmp_path, name):
    folders = [tmp_path / "empty", *([tmp_path / "empty"] if name == "compare" else [])]
    folders[0].mkdir()
    assert_refused(command(name, *folders), 2, "empty: not a run")
    assert not list(folders[0].iterdir())


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
    assert_refused(command("evaluate", run), 2, "data.validation names no text; give some with --data")


def test_a_run_without_a_model_yet_is_refused(command, run):
    shutil.rmtree(run / "model")
    assert_refused(command("evaluate", run), 2, "has no model yet")


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100])
def test_a_damaged_model_is_one_line(command, run, damage):
    (run / "model" / "model.safetensors").write_bytes(damage)
    outcome = command("generate", run)
    assert_refused(outcome, outcome.status, "model")
    assert outcome.status in (1, 2)


def test_a_damaged_checkpoint_is_one_line(command, config, tmp_path):
    command("train", config, "training.max_steps=2")
    next((tmp_path / "free" / "checkpoints" / "step-2").glob("*.safetensors")).write_bytes(b"\x07garbage" * 100)
    assert_refused(command("train", config, "training.max_steps=4"), 2, "step-2: cannot be read.*delete it")


@pytest.mark.parametrize("arguments", [["evaluate", "--nonsense"], ["nonsense"], ["evaluate"], ["generate", "x", "y"]])
def test_a_command_line_that_is_not_understood_is_one_line_and_status_2(command, arguments):
    assert_refused(command(*arguments), 2, "")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--num-samples", 0], "--num-samples"),
        (["--num-samples", "many"], "--num-samples"),
        (["--top-p", 2], "top_p=2.0: 0 "),
        (["--seed", 2**64], "seed=18446744073709551616"),
        (["--temperature", "nan"], "temperature=nan: 0 "),
    ],
)
def test_an_option_out_of_range_is_one_line_and_status_2(command, runs, option, message):
    assert_refused(command("generate", runs["free"], *option), 2, message)


def test_a_run_that_fails_is_status_1(command, config, monkeypatch):
    original = step.training_forward

    def forward(*arguments):
        output = original(*arguments)
        return {**output, "loss": output["loss"] * math.nan}

    monkeypatch.setattr(step, "training_forward", forward)
    outcome = command("train", config)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1].startswith(
        "free-transformer: error: the loss is nan at step 1 (from row 0 of pass 1 of the data"
    )
    assert "Traceback" not in outcome.err


def test_a_full_disk_is_status_1(command, run, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("free_transformer.files.write_text", full)
    outcome = command("evaluate", run, "--max-rows", 2, "--num-samples", 1)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1] == "free-transformer: error: No space left on device"


def test_stopping_by_hand_says_how_to_go_on(command, config, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "training_forward", stop)
    outcome = command("train", config)
    assert outcome.status in (1, 130)
    assert "the same command resumes a training from its last checkpoint" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "error"), [(["report", "nowhere"], ValueError), (["train", "nowhere.yaml"], ValueError)]
)
def test_debug_shows_the_error_where_it_arose(monkeypatch, tmp_path, arguments, error):
    monkeypatch.chdir(tmp_path)
    for argv in (["--debug", *arguments], [*arguments, "--debug"]):
        monkeypatch.setattr(sys, "argv", ["free-transformer", *argv])
        with pytest.raises(error, match="nowhere"):
            main()


def test_help_of_train_explains_every_setting(command):
    outcome = command("train", "--help")
    assert outcome.status == 0
    shown = " ".join(outcome.out.split())
    for name, section in Settings.model_fields.items():
        for key in getattr(section.annotation, "model_fields", {}):
            assert f"{name}.{key} = " in shown, f"{name}.{key}"
    assert "run_dir = " in shown
    assert "KL in bits per plan that costs nothing" in shown


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "generate", "report", "tokenizer"])
def test_every_command_has_help(command, name):
    assert name in command("--help").out
    outcome = command(name, "--help")
    assert (outcome.status, outcome.err) == (0, "")


def test_no_command_shows_the_help(command):
    outcome = command()
    assert "evaluate" in outcome.out + outcome.err


def test_evaluation_draws_as_many_plans_as_asked(command, run, monkeypatch):
    seen = []
    original = likelihood._evaluate_batch

    def watch(model, batch, num_samples, method, prior):
        seen.append((len(batch["input_ids"]), num_samples, method))
        return original(model, batch, num_samples, method, prior)

    monkeypatch.setattr(likelihood, "_evaluate_batch", watch)
    assert command("evaluate", run, "--num-samples", 3, "--max-rows", 10, "--batch-size", 4).status == 0
    assert seen == [(4, 3, "importance"), (4, 3, "importance"), (2, 3, "importance")]


def test_a_dry_run_shows_what_a_run_would_take_and_writes_nothing(command, config, tmp_path):
    before = everything_below(tmp_path)
    outcome = command("train", config, "--dry-run")
    assert outcome.status == 0
    for shown in ("plan table", "encoder", "tokens of a step", "memory of a process", "time of a step", "no decay"):
        assert shown in outcome.out
    assert everything_below(tmp_path) == before


def test_watch_and_report_of_runs(command, runs, tmp_path):
    both = [str(path) for path in runs.values()][:2]
    outcome = command("watch", *both, "--once")
    assert outcome.status == 0 and "gradient norm" in outcome.out
    page = tmp_path / "page.html"
    outcome = command("report", *both, "--out", page)
    assert outcome.status == 0 and page.read_text().count("<svg") >= 1
    assert_refused(command("watch", tmp_path / "none", "--once"), 2, "not a run")


def test_a_sweep_prints_its_table_and_is_status_1_where_a_run_fails(command, config, tmp_path, monkeypatch):
    arguments = ["sweep", config, "--grid", "model.latent_dim=2,3", "training.seed=0,1", f"run_dir={tmp_path / 'all'}"]
    outcome = command(*arguments)
    assert outcome.status == 0 and "latent_dim" in outcome.out and "(best)" in outcome.out
    assert command(*arguments).err.count("done already") == 4

    def forward(*arguments):
        raise ValueError("broken")

    monkeypatch.setattr(step, "training_forward", forward)
    outcome = command(*arguments[:-1], f"run_dir={tmp_path / 'failing'}")
    assert outcome.status == 1 and "4 of 4 runs failed" in outcome.err


@pytest.mark.parametrize("scheme", ["int8-weight", "int8-dynamic"])
def test_export_quantizes_and_generate_writes_with_it(command, run, scheme):
    done = command("export", run, "--to", "torch", "--quantize", scheme)
    folder = run / f"torch-{scheme}"
    assert done.status == 0 and f"MB, written to {folder}" in done.out
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
    long = command("generate", run / "graphs", "--max-new-tokens", 100)
    assert long.status == 2 and "this export was made for 1 of 16" in long.err


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
