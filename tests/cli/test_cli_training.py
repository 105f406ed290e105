"""`train`, `sweep` and `tokenizer`."""

import math
from pathlib import Path

import pytest
from cli_cases import TEXT, assert_refused, everything_below
from cli_fixtures import *  # noqa: F403

from free_transformer.data import load_tokenizer
from free_transformer.files import write_text
from free_transformer.settings import load_baseline_settings, load_settings, override_warnings
from free_transformer.training import Run, step


def test_train_writes_a_run_and_its_report(command, config, tmp_path):
    outcome = command("train", config, "training.max_steps=3", "model.latent_dim=2", f"run_dir={tmp_path / 'new'}")
    assert outcome.status == 0, outcome
    files = {path.name for path in (tmp_path / "new").iterdir() if not path.name.startswith(".")}
    assert files == {"config.yaml", "metrics.jsonl", "history.jsonl", "checkpoints", "model", "report.html"}
    assert str(tmp_path / "new" / "report.html") in outcome.out
    settings = Run(tmp_path / "new").settings
    assert (settings.training.max_steps, settings.model.latent_dim) == (3, 2)


def test_train_resumes_a_run_with_a_message(command, config, tmp_path):
    command("train", config, "training.max_steps=2")
    outcome = command("train", config, "training.max_steps=4")
    assert "resumed at step 2" in outcome.err
    assert [line["step"] for line in Run(tmp_path / "free").read_metrics() if line["split"] == "train"] == [2, 4]


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
        (["only.txt"], "give the text to train on, then the folder to create"),
        (["nowhere.txt", "out"], "nowhere.txt: no such file"),
        (["text.txt", "out", "--vocab-size", 258], "vocab_size=258: must be at least 259"),
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
        (["training.precision=fp16", "training.device=cpu"], "fp16 is supported only on GPUs"),
        (["model.num_heads=3"], "hidden_dim=16 is not a multiple of num_heads=3"),
        (["model.num_heads=16"], "heads of 1: rotary positions need an even size"),
        (["data.train=[nowhere.txt]"], "nowhere.txt: no such file"),
        (["data.tokenizer=nowhere"], "tokenizer 'nowhere'"),
        (["training.batch_size=10000"], "fewer than batch_size=10000"),
        (["nonsense"], "an override needs the form section.name=value"),
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
    assert_refused(outcome, 2, r"bad\.txt: (contains no text|not)")
    assert not (tmp_path / "free").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a YAML file"),
        (b"model: [", "not YAML"),
        (b"just words", "not a settings file; give a YAML file with sections of settings"),
        (b"\xff\xff", "as text .*; give a YAML file"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(command, tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    assert_refused(command("train", path), 2, rf"config\.yaml: .*{message}")


def test_a_folder_that_holds_settings_is_refused_with_its_file(command, runs, tmp_path):
    assert_refused(command("train", runs["free"]), 2, r"a folder, not a file; give the file .*free/config\.yaml$")
    assert_refused(command("train", tmp_path), 2, "a folder, not a file; give a YAML file")


def test_train_without_text_says_how_to_name_it(command, tmp_path):
    write_text(tmp_path / "config.yaml", f"run_dir: {tmp_path / 'run'}")
    assert_refused(command("train", tmp_path / "config.yaml"), 2, "data.train is empty; set it to")


def test_train_baseline_is_the_same_run_without_a_plan_beside_it(command, config, tmp_path):
    write_text(tmp_path / "other.txt", TEXT[::-1])
    overrides = ["training.max_steps=2", f"data.train={tmp_path / 'other.txt'}"]
    outcome = command("train", config, *overrides, "--baseline")
    assert outcome.status == 0 and "warning: data.train is overridden" in outcome.err
    baseline, free = Run(tmp_path / "free-baseline").settings, load_settings(config, overrides)
    assert baseline.model.kind == "baseline" and baseline.optimizer.name == free.optimizer_name == "muon"
    assert baseline.training == free.training and baseline.data == free.data
    assert load_baseline_settings(config, ["run_dir=runs/my-baseline"]).run_dir == Path("runs/my-baseline")
    assert_refused(command("train", config, "model.kind=free", "--baseline"), 2, "model.kind is given twice")


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        (["data.train={folder}/other.txt"], True),
        (["data={{train: {folder}/other.txt}}"], True),
        (["data.train={folder}/other.txt", "data.validation={folder}/text.txt"], False),
        (["data.train={folder}/other.txt", "data.validation=[]"], False),
        (["training.seed=1"], False),
    ],
)
def test_text_of_ones_own_with_the_held_out_text_of_the_file_is_a_warning(config, tmp_path, overrides, warns):
    overrides = [override.format(folder=tmp_path) for override in overrides]
    found = override_warnings(load_settings(config, overrides), overrides, config)
    assert [f"still comes from {config}" in warning for warning in found] == [True] * warns


def test_a_damaged_checkpoint_is_one_line(command, config, tmp_path):
    command("train", config, "training.max_steps=2")
    next((tmp_path / "free" / "checkpoints" / "step-2").glob("*.safetensors")).write_bytes(b"\x07garbage" * 100)
    assert_refused(command("train", config, "training.max_steps=4"), 2, "step-2: cannot be read.*delete it")


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


def test_stopping_by_hand_says_how_to_resume(command, config, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "training_forward", stop)
    outcome = command("train", config)
    assert outcome.status in (1, 130)
    assert "run the same command again to resume training from the last checkpoint" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_dry_run_shows_what_a_run_would_take_and_writes_nothing(command, config, tmp_path):
    before = everything_below(tmp_path)
    outcome = command("train", config, "--dry-run")
    assert outcome.status == 0
    for shown in ("codebook", "encoder", "tokens per step", "memory per process", "measured over 3 steps", "no decay"):
        assert shown in outcome.out
    assert everything_below(tmp_path) == before


def test_a_sweep_prints_its_table_and_is_status_1_where_a_run_fails(command, config, tmp_path, monkeypatch):
    arguments = ["sweep", config, "--grid", "model.latent_dim=2,3", "training.seed=0,1", f"run_dir={tmp_path / 'all'}"]
    outcome = command(*arguments)
    assert outcome.status == 0 and "latent_dim" in outcome.out and "(best)" in outcome.out
    assert command(*arguments).err.count("already done") == 4

    def forward(*arguments):
        raise ValueError("broken")

    monkeypatch.setattr(step, "training_forward", forward)
    write_text(tmp_path / "other.txt", TEXT[::-1])
    outcome = command(*arguments[:-1], f"run_dir={tmp_path / 'failing'}", f"data.train={tmp_path / 'other.txt'}")
    assert outcome.status == 1 and "4 of 4 runs failed" in outcome.err
    assert outcome.err.count("warning: data.train is overridden") == 1
