"""Contents of a run's folder, permitted changes of a resumed run, and the end of a run."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
from free_transformer.cli import output
from free_transformer.cli.main import main
from free_transformer.data import byte_tokenizer
from free_transformer.errors import SettingsError
from free_transformer.files import LOCK, MARKER, check_writable, is_in_use, read_marker
from free_transformer.reporting.console import stdout_console
from free_transformer.runs.report import write_run_report
from free_transformer.training import Run, load_settings, train
from free_transformer.training import step as training_step
from free_transformer.training.checkpoint import list_checkpoints
from processes import untimed

CONFIG = """
run_dir: run
model: {hidden_dim: 16, num_layers: 2, num_heads: 2, latent_dim: 4, free_bits: 1.0}
training: {max_steps: 4, batch_size: 4, seq_len: 32, warmup_steps: 0, eval_every: 0, prior_rows: 0, device: cpu}
data: {train: [train.txt], validation: [held_out.txt], tokenizer: bytes}
logging: {tensorboard: false, sample_every: 0}
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch) -> Path:
    """A folder with text and settings, as the current one."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("the cat sat on the mat and saw a dog run. " * 200)
    Path("held_out.txt").write_text("a dog sat and saw the cat on the mat. " * 40)
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


def train_with(*overrides: str, **options) -> Run:
    return train(load_settings("config.yaml", list(overrides)), quiet=True, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def command(monkeypatch):
    """The command line in this process; returns its exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["free-transformer", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0

    return run


@pytest.fixture
def batches_read(monkeypatch) -> list:
    """The tokens of each batch that training reads, (B, T) each."""
    read, original = [], training_step.training_forward

    def forward(model, batch, *others):
        read.append(batch["input_ids"])
        return original(model, batch, *others)

    monkeypatch.setattr(training_step, "training_forward", forward)
    return read


def command_in(folder: Path, *arguments: str) -> None:
    os.chdir(folder)
    processes.command(*arguments)


def command_under_nohup(folder: Path, *arguments: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command_in(folder, *arguments)


# Folders


@pytest.mark.parametrize("name", ["model", "checkpoints", "metrics.jsonl", "report.html", "metrics.json", "adapter"])
def test_folder_with_files_of_others_is_refused_and_stays(project, name):
    if "." in name:
        Path(name).write_text("mine")
    else:
        Path(name).mkdir()
        Path(name, "network.py").write_text("mine")
    before = contents(project)
    with pytest.raises(SettingsError, match=rf"holds {name}, not written by a run.*choose another folder"):
        train_with("run_dir=.")
    assert contents(project) == before


def test_folder_with_other_files_can_be_trained_in(project):
    run = train_with("run_dir=.")
    assert Path("config.yaml").read_text() == CONFIG  # a person's own
    assert run.config_file == Path("config.used.yaml")
    assert Run(".").settings.training.batch_size == 4
    train_with("run_dir=.", "training.max_steps=6")
    assert Path("config.yaml").read_text() == CONFIG
    assert Run(".").settings.training.max_steps == 6


def test_settings_edited_in_the_folder_of_their_run_are_kept(project):
    run = train_with()
    edited = run.config_file.read_text().replace("max_steps: 4", "max_steps: 6  # longer")
    run.config_file.write_text(edited)
    train(load_settings("run/config.yaml"), quiet=True)
    assert Path("run/config.yaml").read_text() == edited
    assert Run("run").settings.training.max_steps == 6


def test_files_that_somebody_put_into_the_model_folder_are_kept():
    run = train_with()
    (run.model_folder / "notes").mkdir()
    (run.model_folder / "notes" / "mine.txt").write_text("mine")
    before = (run.model_folder / "model.safetensors").read_bytes()
    train_with("training.max_steps=6")
    assert (run.model_folder / "notes" / "mine.txt").read_text() == "mine"
    assert (run.model_folder / "model.safetensors").read_bytes() != before


def test_checkpoint_with_files_of_others_is_not_dropped():
    run = train_with("training.save_every=1", "training.max_steps=2", "checkpoint.save_total=1")
    (run.checkpoints / "step-2" / "notes.txt").write_text("mine")
    train_with("training.save_every=1", "training.max_steps=4", "checkpoint.save_total=1")
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-2", "step-4"]


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints and model"])
def test_finished_run_without_checkpoints_is_refused_and_stays(lost):
    run = train_with("training.save_every=1", "training.log_every=1")
    shutil.rmtree(run.checkpoints)
    if "model" in lost:
        shutil.rmtree(run.model_folder)
    before = contents(run.path)
    with pytest.raises(SettingsError, match=r"no checkpoint to resume from; choose another run_dir, or delete"):
        train_with("training.max_steps=2")
    assert contents(run.path) == before


def test_refused_settings_leave_no_folder_behind(project):
    with pytest.raises(SettingsError):
        train_with("run_dir=new/deep/run", "data.train=nowhere.txt")
    assert not Path("new").exists()


def test_refused_settings_leave_an_existing_folder_as_it_was(project):
    before = contents(project)
    with pytest.raises(SettingsError):
        train_with("run_dir=.", "data.train=nowhere.txt")
    assert contents(project) == before


def test_folder_that_cannot_be_written_to_is_refused_before_training(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(SettingsError, match=r"run: cannot be written to \(Permission denied\)"):
        train_with()


def test_place_of_results_is_tried_without_leaving_anything(tmp_path, monkeypatch):
    before = contents(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(SettingsError, match=r"new: cannot be written to \(Read-only file system\)"):
        check_writable(tmp_path / "new")


HOLD = """
import os, pathlib, time
from free_transformer.files import claimed_folder
with claimed_folder(pathlib.Path("run"), "run", []):
    if os.environ.get("FORK") and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    pathlib.Path("run/held").touch()
    time.sleep(60)
"""


def hold_folder(**environment: str) -> subprocess.Popen:
    """A process that claims the folder `run`, until it is killed."""
    options = {"env": {**os.environ, **environment}, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD], **options)
    while not Path("run/held").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_folder_in_use_is_refused_with_its_process_and_free_when_that_is_killed():
    process = hold_folder()
    assert is_in_use(Path("run")) and Run("run").in_use
    with pytest.raises(SettingsError, match=rf"run: process {process.pid} on .* is working in this folder; wait"):
        train_with()
    process.kill()
    process.wait()
    assert not is_in_use(Path("run"))
    train_with()
    assert read_marker(Path("run"))["owner"] is None


def test_lock_does_not_depend_on_forked_workers():
    """A worker that outlives a killed run for a moment must not keep its folder."""
    process = hold_folder(FORK="1")
    process.kill()
    process.wait()
    assert not is_in_use(Path("run"))
    os.killpg(process.pid, signal.SIGKILL)


def test_marker_and_lock_are_all_that_is_hidden_in_a_run():
    run = train_with()
    names = {path.name for path in run.path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "history.jsonl", "checkpoints", "model", MARKER, LOCK}


def test_run_that_is_copied_has_ended_whatever_its_times(command):
    run = train_with()
    shutil.copytree(run.path, "copy")
    os.utime("copy/model/config.json", (1, 1))
    assert Run("copy").has_ended
    assert command("watch", "copy") == 0


# Resuming


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.num_heads=4", "model.num_heads=4: run/.* was trained with 2"),
        ("model.plan_span=4", "model.plan_span=4: run/.* was trained with sequence"),
        ("model.rope_theta=100", r"rope_theta=100(\.0)?: run/.* was trained with 10000"),
        ("model.rms_norm_eps=0.1", "model.rms_norm_eps=0.1: run/.* was trained with"),
        ("model.hidden_act=gelu", "model.hidden_act=gelu: run/.* was trained with silu"),
        ("model.attention_bias=true", "model.attention_bias=True: run/.* was trained with False"),
        ("model.latent_dim=5", "model.latent_dim=5: run/.* was trained with 4"),
        ("model.kind=baseline", "model.kind=baseline: run/.* was trained with free"),
        ("optimizer.name=adamw", "optimizer.name=adamw: run/.* was trained with muon"),
    ],
)
def test_resuming_another_model_is_refused_with_both_values(change, named):
    run = train_with()
    before = contents(run.path)
    with pytest.raises(SettingsError, match=named) as error:
        train_with("training.max_steps=6", change, allow_change=["all"])
    assert "\n" not in str(error.value)
    assert contents(run.path) == before


def test_resuming_with_another_tokenizer_of_the_same_size_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("one")
    words = json.loads(Path("one/tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    shutil.copytree("one", "other")
    Path("other/tokenizer.json").write_text(json.dumps(words))
    train_with("data.tokenizer=one")
    with pytest.raises(SettingsError, match=r"data\.tokenizer=.*other.*: .* was trained with .*one"):
        train_with("data.tokenizer=other", "training.max_steps=6", allow_change=["all"])
    shutil.move("one", "moved")  # the same tokenizer elsewhere
    train_with("data.tokenizer=moved", "training.max_steps=6")


@pytest.mark.parametrize(
    "change",
    [
        "training.seed=7",
        "training.seq_len=16",
        "data.train=other.txt",
        "data.train={train.txt: 1, other.txt: 1}",
        "data.streaming=true",
    ],
)
def test_resuming_on_other_rows_needs_permission(change):
    Path("other.txt").write_text("zebra yak newt owl ox. " * 300)
    run = train_with()
    before = contents(run.path)
    name = change.partition("=")[0]
    with pytest.raises(
        SettingsError, match=rf"{name}=.*: run/.* was trained with .*allow the change with --allow-change {name}"
    ):
        train_with("training.max_steps=6", change)
    assert contents(run.path) == before
    train_with("training.max_steps=6", change, allow_change=[name])
    assert [line["step"] for line in run.read_history()] == [0, 4]
    assert name in run.read_history()[1]["changes"]


def test_edited_text_of_the_same_name_and_length_needs_permission():
    train_with()
    Path("train.txt").write_text(Path("train.txt").read_text().replace("dog", "cow"))
    with pytest.raises(SettingsError, match=r"data\.train=.*--allow-change data\.train"):
        train_with("training.max_steps=6")


def test_text_that_was_moved_is_the_same():
    train_with()
    Path("texts").mkdir()
    shutil.move("train.txt", "texts/moved.txt")
    train_with("data.train=texts/moved.txt", "training.max_steps=6")


def test_allowed_text_is_read_from_its_beginning(batches_read):
    Path("other.txt").write_text("zebra yak newt owl ox. " * 300)
    train_with("run_dir=alone", "data.train=other.txt", "training.max_steps=2")
    train_with()
    train_with("training.max_steps=6", "data.train=other.txt", allow_change=["data.train"])
    assert all((one == other).all() for one, other in zip(batches_read[:2], batches_read[-2:], strict=True))


def test_another_batch_size_reads_on_without_repeating_rows(batches_read):
    Path("train.txt").write_text(" ".join(f"{number:06d}" for number in range(200)))  # 45 rows, all different
    train_with("training.batch_size=9", "training.max_steps=2", "training.seq_len=32")
    train_with("training.batch_size=3", "training.max_steps=11", "training.seq_len=32")
    rows = [tuple(row) for batch in batches_read for row in batch.tolist()]
    assert len(rows) == 45
    assert len(set(rows)) == 45


def test_changes_that_are_allowed_are_said_recorded_and_shown(capsys):
    train_with()
    train(load_settings("config.yaml", ["training.max_steps=6", "training.learning_rate=0.5", "model.free_bits=2"]))
    told = " ".join(capsys.readouterr().err.split())
    assert "changed: training.learning_rate from 0.001 to 0.5" in told
    assert "changed: model.free_bits from 1.0 to 2.0" in told
    line = Run("run").read_history()[-1]
    assert line["step"] == 4
    assert line["changes"]["training.learning_rate"] == [0.001, 0.5]
    page = write_run_report(Path("run")).read_text()
    assert "training.learning_rate: 0.001 → 0.5" in page


def test_raised_steps_keep_the_warm_up_that_followed_from_fewer(project):
    Path("config.yaml").write_text(CONFIG.replace("warmup_steps: 0, ", ""))
    assert train_with("training.max_steps=20").settings.training.warmup_steps == 2
    assert train_with("training.max_steps=40").settings.training.warmup_steps == 2
    assert train_with("training.max_steps=50", "training.warmup_steps=5").settings.training.warmup_steps == 5


def test_finished_run_keeps_its_record(capsys):
    run = train_with()
    before = contents(run.path)
    train(load_settings("config.yaml", ["training.learning_rate=5.0", "training.max_steps=2"]))
    assert contents(run.path) == before
    told = " ".join(capsys.readouterr().err.split())
    assert "already trained to step 4" in told and "no effect: training.learning_rate from 0.001 to 5.0" in told


def test_finished_run_without_its_model_writes_it_again():
    run = train_with()
    before = (run.model_folder / "model.safetensors").read_bytes()
    config = run.config_file.read_bytes()
    shutil.rmtree(run.model_folder)
    train_with("training.learning_rate=5.0")
    assert (run.model_folder / "model.safetensors").read_bytes() == before
    assert run.config_file.read_bytes() == config


def test_attempts_without_results_are_not_in_the_history(monkeypatch):
    from free_transformer.training import loop

    train_with()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(loop._Trainer, "_optimizer_step", lambda self, totals: (_ for _ in ()).throw(RuntimeError()))
        train_with("training.max_steps=6", "training.learning_rate=0.5")
    train_with("training.max_steps=6")
    assert [(line["step"], list(line["changes"])) for line in Run("run").read_history()] == [
        (0, []),
        (4, ["training.max_steps"]),
    ]


def test_raised_steps_that_move_stages_need_permission():
    stages = "curriculum.stages=[{seq_len: 16}, {seq_len: 32}]"
    train_with(stages)
    with pytest.raises(
        SettingsError, match=r"stages=16 tokens from step 0: run/.* was trained with .*, 32 tokens from step 2 "
    ):
        train_with(stages, "training.max_steps=8")
    fixed = "curriculum.stages=[{seq_len: 16, steps: 2}, {seq_len: 32}]"
    train_with(fixed, "run_dir=fixed")
    train_with(fixed, "run_dir=fixed", "training.max_steps=8")


# Text


@pytest.mark.parametrize(
    ("trained", "held_out"), [("train.txt", "train.txt"), ("texts", "texts/a.txt"), ("train.txt", "copy.txt")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_text_that_is_trained_on_is_a_warning(capsys, trained, held_out, streaming):
    Path("texts").mkdir()
    shutil.copy("train.txt", "texts/a.txt")
    shutil.copy("train.txt", "copy.txt")
    sources = [f"data.train={trained}", f"data.validation={held_out}", f"data.streaming={str(streaming).lower()}"]
    train(load_settings("config.yaml", [*sources, "training.max_steps=1"]))
    told = " ".join(capsys.readouterr().err.split())
    expected = not (streaming and held_out == "copy.txt")  # the documents of streamed text are not compared
    assert ("also in the training text" in told) == expected


def test_a_run_measures_its_own_text_wherever_the_command_runs(tmp_path, monkeypatch):
    train_with()
    Path("elsewhere").mkdir()
    Path("elsewhere/held_out.txt").write_text("QUITE ANOTHER TEXT 12345. " * 30)
    monkeypatch.chdir("elsewhere")
    run = Run("../run")
    assert run.settings.data.validation == [str(tmp_path / "held_out.txt")]
    rows = run.held_out_rows(run.load_tokenizer())
    assert rows.text_bytes == (tmp_path / "held_out.txt").stat().st_size


def test_tokenizer_with_gaps_in_its_ids_trains():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(Path("train.txt").read_text().split()))
    vocabulary = {"<unk>": 0, "<end>": 1, **{word: 50 * number for number, word in enumerate(words, 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.save_pretrained("tokenizer")
    run = train_with("data.tokenizer=tokenizer", "training.seq_len=16")
    assert run.load_model().config.vocab_size == 50 * len(words) + 1


@pytest.mark.parametrize("name", ["eval_every", "sample_every"])
def test_zero_is_never(capsys, name):
    section = "training" if name == "eval_every" else "logging"
    other = "logging.sample_every=2" if name == "eval_every" else "training.eval_every=2"
    run = train(load_settings("config.yaml", [f"{section}.{name}=0", other, "logging.sample_tokens=2"]))
    validated = any(line["split"] == "validation" for line in run.read_metrics())
    sampled = "generates:" in capsys.readouterr().err
    assert (validated, sampled) == ((False, True) if name == "eval_every" else (True, False))


# Results


def test_results_of_an_earlier_model_are_named_as_such(command):
    run = train_with()
    assert command("evaluate", "run", "--num-plans", "2") == 0
    assert "earlier model" not in write_run_report(run.path).read_text()
    card = (run.model_folder / "README.md").read_text()
    nll = f"{json.loads(run.evaluation_file.read_text())['nll']:.4f}"
    assert nll in card
    train_with("training.max_steps=6", "training.learning_rate=0.02")
    page = write_run_report(run.path).read_text()
    assert "These results are from an earlier model (step 4)" in page
    assert nll not in (run.model_folder / "README.md").read_text()
    assert command("evaluate", "run", "--num-plans", "2") == 0
    assert "earlier model" not in write_run_report(run.path).read_text()


def broken_output(what: str):
    if what == "full":
        return Path("/dev/full").open("w")
    if what == "ascii":
        return io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("what", ["full", "ascii", "closed"])
def test_results_are_written_before_they_are_shown(command, monkeypatch, what):
    run = train_with()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken_output(what))
        patch.setattr(output, "console", stdout_console())  # one that has met a closed pipe stays quiet
        status = command("evaluate", "run", "--num-plans", "2")
    assert json.loads(run.evaluation_file.read_text())["nll"] > 0
    assert (status == 0) == (what == "ascii")


def test_foreign_metrics_are_neither_shown_nor_a_traceback(command, capsys):
    run = train_with()
    run.evaluation_file.write_text('{"accuracy": 0.5}')
    assert "Held-out text" not in write_run_report(run.path).read_text()
    assert command("evaluate", "run") == 2
    assert "not a results file" in capsys.readouterr().err


def test_name_with_brackets_is_shown_as_it_is(capsys):
    train(load_settings("config.yaml", ["run_dir=runs/[v2]"]))
    told = capsys.readouterr().err
    assert "[v2]: 0.0" in told and "trained: runs/[v2]" in told


# Signals


def start_long_run(folder: Path, *overrides: str, target=command_in):
    settings = ["training.max_steps=1000000", "training.save_every=0", "training.log_every=1", *overrides]
    (process,) = processes.start(1, target, folder, "train", "config.yaml", *settings, log=folder / "log")
    while process.is_alive() and not (Path("run/metrics.jsonl").exists() and len(untimed(Path("run"))) > 2):
        time.sleep(0.01)
    return process


def status_and_log(process, folder: Path) -> tuple[int | None, str]:
    process.join(60)
    return process.exitcode, (folder / "log").read_text()


def test_signal_that_is_ignored_stays_ignored(project):
    process = start_long_run(project, target=command_under_nohup)
    os.kill(process.pid, signal.SIGHUP)
    steps = len(untimed(Path("run")))
    while process.is_alive() and len(untimed(Path("run"))) < steps + 3:
        time.sleep(0.01)
    assert process.is_alive()
    process.terminate()
    assert status_and_log(process, project)[0] == 128 + signal.SIGTERM


def test_second_interrupt_while_saving_waits_for_the_checkpoint(monkeypatch):
    from free_transformer.training import checkpoint
    from free_transformer.training.signals import TrainingStopped

    save = checkpoint.dcp.save

    def interrupted_save(*arguments, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", interrupted_save)
    with pytest.raises(TrainingStopped):
        train_with("training.save_every=2")
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"step-2", "step-3"}  # none is half saved


def test_second_interrupt_outside_a_save_ends_the_step_in_one_line(project):
    (process,) = processes.start(
        *(1, command_in, project, "train", "config.yaml", "training.gradient_accumulation_steps=100000"),
        log=project / "log",
    )
    while process.is_alive() and not Path("run/metrics.jsonl").exists():
        time.sleep(0.01)
    while process.is_alive() and "repeat the signal to end it unsaved" not in (project / "log").read_text():
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # the one before was the second
        os.kill(process.pid, signal.SIGINT)
    status, told = status_and_log(process, project)
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in told and "interrupted" in told.splitlines()[-1]
    assert not is_in_use(Path("run"))
    assert not list(Path("run").rglob(".tmp-*"))


def test_terminal_that_is_gone_does_not_end_a_run():
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "free_transformer", "train", "config.yaml"]
    done = subprocess.run(program, stdout=subprocess.PIPE, stderr=writing, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "report: run/report.html")
    assert Run("run").has_ended


def test_steps_that_are_trained_again_are_purged_from_tensorboard(monkeypatch):
    from free_transformer.training import loop

    original = loop._Trainer._optimizer_step

    def stop(self, totals):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return original(self, totals)

    settings = ["logging.tensorboard=true", "training.log_every=1", "training.save_every=2", "training.max_steps=5"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Trainer, "_optimizer_step", stop)
        train_with(*settings)
    train_with(*settings)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run/tensorboard").Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
