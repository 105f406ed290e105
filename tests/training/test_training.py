import dataclasses
import errno
import json
import math
import os
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.testing import assert_close

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import build_rows, byte_tokenizer, streamed_batches
from free_transformer.data.rows import Rows
from free_transformer.files import LOCK, MARKER
from free_transformer.model.initialization import build_baseline
from free_transformer.model.plan import BinaryMapper, PlanTable
from free_transformer.settings import Settings, parse_settings
from free_transformer.training import Run, SettingsError, checkpoint, loop, train
from free_transformer.training import step as training_step
from free_transformer.training.checkpoint import (
    CheckpointFailed,
    Checkpoints,
    TrainState,
    list_checkpoints,
    load_checkpoint,
)
from free_transformer.training.loop import TrainingFailed
from free_transformer.training.optimizers import (
    build_optimizers,
    clip_gradients,
    codebook_optimizer,
    learning_rate_scale,
    set_learning_rate,
)
from free_transformer.training.signals import TrainingStopped
from free_transformer.training.state import build_model
from processes import SENTENCES, untimed

KINDS = ["free", "baseline"]
TINY = {
    "model": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "latent_dim": 3, "free_bits": 0.25}
    | {"min_bits": 0.0, "aggregate_weight": 0.0},
    "training": {"max_steps": 6, "batch_size": 4, "seq_len": 16, "warmup_steps": 2, "log_every": 1, "eval_every": 0}
    | {"learning_rate": 3e-3, "save_every": 0, "device": "cpu", "prior_rows": 8}
    | {"optimizer": "adamw", "min_lr_ratio": 0.1},
    "logging": {"tensorboard": False, "sample_every": 0, "sample_tokens": 4},
}


ADAMW = Settings.model_validate({"optimizer": {"name": "adamw"}})
RATES = {"learning_rate": 0.5, "muon_learning_rate": 0.25, "warmup_steps": 0}


@pytest.fixture
def tiny_settings(tmp_path):
    """Settings of a run of seconds, `tiny_settings("name", training={...}, model={...})`."""
    text = tmp_path / "text.txt"
    text.write_text("".join(SENTENCES[i % 4] for i in range(40)))
    short = tmp_path / "short.jsonl"  # short documents, packed and padded
    short.write_text("".join(json.dumps({"text": sentence[: 4 + i]}) + "\n" for i, sentence in enumerate(SENTENCES)))

    (tmp_path / "many").mkdir()  # documents, for several workers to read
    for i in range(7):
        (tmp_path / "many" / f"{i}.txt").write_text("".join(SENTENCES[(i + j) % 4] for j in range(6)))

    def build(name: str = "run", **sections) -> Settings:
        values = {section: {**TINY.get(section, {}), **sections.get(section, {})} for section in {*TINY, *sections}}
        values["data"] = {"train": [str(text)], "validation": [str(short)], **sections.get("data", {})}
        return parse_settings({"run_dir": str(tmp_path / name), **values})

    return build


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.load_model().state_dict()


def assert_same_weights(one: Run, other: Run, **close) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(
            ours[name], theirs[name], **(close or {"atol": 0, "rtol": 0}), msg=lambda text, n=name: f"{n} {text}"
        )


def everything_below(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def certain_plans(monkeypatch) -> None:
    """The most likely plan instead of a sample, so that batches cut differently see the same plans."""
    monkeypatch.setattr(BinaryMapper, "forward", lambda self, plan_logits, generator=None: plan_logits > 0)


def stop_before_step(monkeypatch, step: int) -> None:
    """As a person's Ctrl-C, or the machine's end, in the middle of optimizer step `step` (from 0)."""
    original = loop._Trainer._optimizer_step

    def optimizer_step(self, *arguments):
        if self.state.step == step:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(loop._Trainer, "_optimizer_step", optimizer_step)


def loss_turns_nan(monkeypatch, step: int) -> None:
    """The loss of optimizer step `step` (from 0), and so the weights after it, are no numbers."""
    original, calls = training_step.training_forward, []

    def forward(*arguments):
        output = original(*arguments)
        calls.append(None)
        if len(calls) > step:
            output["loss"] = output["loss"] * math.nan
        return output

    monkeypatch.setattr(training_step, "training_forward", forward)


def tiny_state(**changes) -> TrainState:
    sizes = {"vocab_size": 16, "hidden_dim": 8, "num_layers": 2, "num_heads": 2, "latent_dim": 2, **changes}
    model = FreeTransformer(FreeTransformerConfig(**sizes))
    optimizers = build_optimizers(model, ADAMW)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return TrainState(model, optimizers, step=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_files_of_a_run(tiny_settings, kind):
    settings = tiny_settings(model={"kind": kind}, training={"eval_every": 3, "save_every": 4})
    run = train(settings, quiet=True)
    found = {path.name for path in run.path.iterdir() if not path.name.startswith(".")}
    assert found == {"config.yaml", "metrics.jsonl", "history.jsonl", "checkpoints", "model"}
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-4", "step-6"]
    assert run.settings.model.kind == kind
    assert run.load_tokenizer().encode("é", add_special_tokens=False) == list("é".encode())
    assert not run.load_model().training


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_name_step_split_losses_rate_and_speed(tiny_settings, kind):
    run = train(tiny_settings(model={"kind": kind}, training={"eval_every": 3, "max_steps": 5}), quiet=True)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    training = [line for line in lines if line["split"] == "train"]
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in validation] == [3, 5]
    names = {"step", "split", "loss", "reconstruction", "lr", "tokens_per_second", "grad_norm", "grad_norm_max"}
    names |= {"spikes"} | ({"kl", "kl_hinge", "live_bits"} if kind == "free" else set())
    for line in training:
        assert line.keys() - {"advice"} == names  # the latter where something needs doing
        assert all(math.isfinite(line[name]) for name in names - {"split"})
    for line in validation:
        assert {"loss", "nll"} <= line.keys()
        assert ({"reconstruction", "kl", "elbo", "prior", "gap"} <= line.keys()) == (kind == "free")


def test_loss_is_reconstruction_and_the_kl_beyond_the_free_bits(tiny_settings):
    model = {"free_bits": 0.0, "latent_dim": 3, "plan_span": 5}  # 15 predicted tokens and 4 plans in a row of 16
    run = train(tiny_settings(model=model, training={"kl_weight": 0.7, "max_steps": 3}), quiet=True)
    for line in run.read_metrics()[:2]:
        hinge = line["kl"] * math.log(2) * 4 / 15
        assert_close(line["loss"], line["reconstruction"] + 0.7 * hinge, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [{"kind": "free"}, {"kind": "baseline"}, {"kind": "free", "latent_dim": 20}])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_changes(tiny_settings, model, optimizer):
    settings = tiny_settings(model={**model, "free_bits": 0.0}, training={"optimizer": optimizer, "max_steps": 3})
    torch.manual_seed(settings.training.seed)
    before = dict(build_model(settings, byte_tokenizer()).named_parameters())
    after = dict(train(settings, quiet=True).load_model().named_parameters())
    assert before.keys() == after.keys()
    for name in before:
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls_on_text_that_is_easy(tiny_settings, kind, optimizer):
    training = {"max_steps": 60, "learning_rate": 1e-2, "optimizer": optimizer}
    lines = train(tiny_settings(model={"kind": kind}, training=training), quiet=True).read_metrics()
    losses = [line["reconstruction"] for line in lines if line["split"] == "train"]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


@pytest.mark.parametrize("source", ["text.txt", "short.jsonl"])
@pytest.mark.parametrize("model", [{"kind": "baseline"}, {"plan_span": "sequence"}, {"plan_span": 4}])
def test_accumulating_two_batches_of_four_is_one_of_eight(tiny_settings, tmp_path, monkeypatch, source, model):
    certain_plans(monkeypatch)
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": "ab" * (i % 9 + 2)}) + "\n" for i in range(40)))
    data = {"train": [str(tmp_path / source)]}
    model = {"free_bits": 0.0, **model}
    one, other = (
        tiny_settings(name, model=model, data=data, training={"max_steps": 1, **training})
        for name, training in {
            "one": {"batch_size": 8},
            "other": {"batch_size": 4, "gradient_accumulation_steps": 2},
        }.items()
    )
    gradients = []

    def keep_gradients(parameters, *_):
        gradients.append([parameter.grad.clone() for parameter in parameters])

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", keep_gradients)
    lines = [train(settings, quiet=True).read_metrics()[0] for settings in (one, other)]
    assert len(gradients) == 2
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)
    for name in ("loss", "reconstruction"):
        assert_close(lines[0][name], lines[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (True, 0), (False, 2), (True, 2)])
@pytest.mark.parametrize("stop", [4, 7])
def test_resuming_is_the_same_as_not_stopping(tiny_settings, tmp_path, monkeypatch, kind, streaming, workers, stop):
    training = {"max_steps": 9, "gradient_accumulation_steps": 2, "save_every": 3, "eval_every": 2}
    sections = {
        "model": {"kind": kind, "dropout": 0.2},
        "training": training,
        "data": {"streaming": streaming, "shuffle_buffer": 7, "workers": workers, "train": [str(tmp_path / "many")]},
        "logging": {"sample_every": 2},
    }
    whole = train(tiny_settings("whole", **sections), quiet=True)
    with monkeypatch.context() as patch:
        stop_before_step(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings("stopped", **sections), quiet=True)
    assert not (whole.path.parent / "stopped" / "model").exists()
    resumed = train(tiny_settings("stopped", **sections), quiet=True)
    assert_same_weights(resumed, whole)
    assert untimed(resumed.path) == untimed(whole.path)


def test_a_run_resumed_with_other_accumulation_continues_at_its_position(tiny_settings, monkeypatch):
    read = []
    original = training_step.training_forward

    def forward(model, batch, *others):
        read.append(batch["input_ids"])
        return original(model, batch, *others)

    monkeypatch.setattr(training_step, "training_forward", forward)
    train(tiny_settings("once", training={"max_steps": 6}), quiet=True)
    train(tiny_settings("twice", training={"max_steps": 2}), quiet=True)
    train(tiny_settings("twice", training={"max_steps": 4, "gradient_accumulation_steps": 2}), quiet=True)
    assert len(read) == 12
    assert all(torch.equal(one, other) for one, other in zip(read[:6], read[6:], strict=True))


def test_resuming_between_two_lines_of_metrics_writes_the_same_lines(tiny_settings, monkeypatch):
    training = {"training": {"max_steps": 8, "save_every": 3, "log_every": 2}}
    whole = train(tiny_settings("whole", **training), quiet=True)
    with monkeypatch.context() as patch:
        stop_before_step(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings("stopped", **training), quiet=True)
    assert untimed(train(tiny_settings("stopped", **training), quiet=True).path) == untimed(whole.path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_from_the_checkpoint_of_each_step_is_the_same(tiny_settings, monkeypatch, optimizer):
    sections = {"training": {"max_steps": 4, "save_every": 1, "optimizer": optimizer}}
    whole = train(tiny_settings("whole", **sections), quiet=True)
    for stop in (1, 2, 3):
        with monkeypatch.context() as patch:
            stop_before_step(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                train(tiny_settings("stopped", **sections), quiet=True)
    assert_same_weights(train(tiny_settings("stopped", **sections), quiet=True), whole)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tiny_settings, monkeypatch):
    whole = train(tiny_settings("whole"), quiet=True)
    with monkeypatch.context() as patch:
        stop_before_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings("stopped"), quiet=True)
    resumed = train(tiny_settings("stopped"), quiet=True)
    assert_same_weights(resumed, whole)
    assert untimed(resumed.path) == untimed(whole.path)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_packed_row_train_as_if_each_were_alone(tiny_settings, monkeypatch, kind):
    certain_plans(monkeypatch)
    model = build_model(tiny_settings(model={"kind": kind}), byte_tokenizer()).train()
    rows = build_rows(["abcde", "fgh"], byte_tokenizer(), 16)
    alone = [build_rows([text], byte_tokenizer(), len(text) + 2) for text in ("abcde", "fgh")]
    assert [len(each) for each in (rows, *alone)] == [1, 1, 1]
    assert all("position_ids" not in each.take([0]) for each in alone)
    together, *apart = (training_step.training_forward(model, each.take([0]), 10) for each in (rows, *alone))
    for name in ("loss", "reconstruction"):
        assert_close(together[name], apart[0][name] + apart[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_compiled_train_the_same(tiny_settings, monkeypatch, kind):
    compiled = []

    def compile_quickly(self):
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    one, other = (
        train(tiny_settings(name, model={"kind": kind}, training={"compile": name == "compiled"}), quiet=True)
        for name in ("plain", "compiled")
    )
    blocks = {
        "free": ["DecoderLayer", "InjectedDecoderLayer", "PlanEncoder"],
        "baseline": ["LlamaDecoderLayer"] * 2,
    }
    assert compiled == blocks[kind]
    assert_same_weights(other, one, atol=1e-5, rtol=1e-4)


def test_evaluation_and_samples_do_not_move_training(tiny_settings):
    silent = tiny_settings("silent", model={"dropout": 0.2}, data={"validation": []})
    busy = tiny_settings("busy", model={"dropout": 0.2}, training={"eval_every": 1}, logging={"sample_every": 1})
    assert_same_weights(train(silent, quiet=True), train(busy, quiet=True))


def test_a_finished_run_started_again_changes_nothing(tiny_settings):
    settings = tiny_settings(training={"save_every": 2})
    before = everything_below(train(settings, quiet=True).path)
    assert everything_below(train(settings, quiet=True).path) == before


def test_resume_never_refuses_a_folder_with_checkpoints_and_leaves_it(tiny_settings):
    before = everything_below(train(tiny_settings(), quiet=True).path)
    settings = tiny_settings(training={"resume": "never"})
    with pytest.raises(SettingsError, match=r"choose another run_dir, or training\.resume=auto"):
        train(settings, quiet=True)
    assert everything_below(settings.run_dir) == before


def full_disk(monkeypatch, after: int = 0) -> None:
    """Each checkpoint after so many is only half saved."""
    write, calls = HuggingFaceStorageWriter.write_data, []

    def write_data(self, plan, planner):
        calls.append(None)
        if len(calls) <= after:
            return write(self, plan, planner)
        (Path(self.path) / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_clear_error_and_the_checkpoints_before_stay(tiny_settings, monkeypatch, background):
    training = {"save_every": 2, "async_save": background}
    settings = tiny_settings(training=training)
    with monkeypatch.context() as patch:
        full_disk(patch, after=1)
        with pytest.raises(
            CheckpointFailed, match=r"step-4: .* cannot be written \(No space left on device\)"
        ) as error:
            train(settings, quiet=True)
    assert "\n" not in str(error.value)
    folder = settings.run_dir / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-2"]
    assert_same_weights(train(settings, quiet=True), train(tiny_settings("whole", training=training), quiet=True))


def test_writing_a_checkpoint_again_replaces_it_whole_or_not_at_all(tmp_path, monkeypatch):
    state = tiny_state()
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(state)
    before = everything_below(tmp_path)
    full_disk(monkeypatch)
    with pytest.raises(CheckpointFailed, match="No space left"):
        checkpoints.save(state)
    assert everything_below(tmp_path) == before
    assert list_checkpoints(tmp_path) == [path]


def test_what_a_crash_left_behind_is_never_taken_for_a_checkpoint_and_cleared(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(tiny_state())
    leftover = tmp_path / ".tmp-step-2"
    leftover.mkdir()
    (leftover / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert list_checkpoints(tmp_path) == [path]
    assert checkpoints.load_newest(tiny_state()) == path
    assert {each.name for each in tmp_path.iterdir()} == {"step-1", "notes"}


def test_checkpoints_are_listed_by_number_and_only_the_newest_stay(tmp_path):
    state = tiny_state()
    for step in (8, 9, 10, 11):
        state.step = step
        Checkpoints(tmp_path, keep=3).save(state)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10", "step-11"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_restores_weights_optimizer_randomness_and_step(tmp_path):
    saved, fresh = tiny_state(tie_embeddings=True), tiny_state(tie_embeddings=True)
    path = Checkpoints(tmp_path, keep=1).save(saved)
    expected = torch.rand(3)
    fresh.step = 0
    load_checkpoint(path, fresh)
    assert torch.equal(torch.rand(3), expected)
    assert fresh.step == 1
    for one, other in zip(saved.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, other)
    one, other = (state.optimizers[0].state_dict() for state in (saved, fresh))
    assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 16}, r"has shape \(.*\), but this configuration needs \(.*\).*another run_dir"),
        ({"latent_dim": 3}, r"has shape \(.*\), but this configuration needs \(.*\).*another run_dir"),
        ({"num_layers": 3}, r"this configuration has no model\.layers\.2\..*another run_dir"),
        ({"num_layers": 1}, r"the checkpoint has no model\.layers\.1\..*another run_dir"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_in_one_line_and_nothing_changes(tmp_path, changes, message):
    path = Checkpoints(tmp_path, keep=1).save(tiny_state(**changes))
    state = tiny_state()
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(SettingsError, match=message) as error:
        load_checkpoint(path, state)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())


def test_resuming_with_another_shape_is_refused_and_the_run_stays_as_it_was(tiny_settings):
    before = everything_below(train(tiny_settings(), quiet=True).path)
    settings = tiny_settings(model={"hidden_dim": 32})
    with pytest.raises(SettingsError, match="another run_dir"):
        train(settings, quiet=True)
    assert everything_below(settings.run_dir) == before


def test_resuming_with_another_optimizer_is_refused_by_its_name(tiny_settings):
    train(tiny_settings(), quiet=True)
    with pytest.raises(SettingsError, match="optimizer"):
        train(tiny_settings(training={"optimizer": "muon", "max_steps": 8}), quiet=True)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        damaged = {"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x07" * len(content)}[how]
        path.write_bytes(damaged)


@pytest.mark.parametrize("file", ["*.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["empty", "cut", "garbage", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path, file, how):
    path = Checkpoints(tmp_path, keep=1).save(tiny_state())
    damage(next(path.glob(file)), how)
    with pytest.raises(SettingsError, match="step-1: cannot be read") as error:
        load_checkpoint(path, tiny_state())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["cut", "foreign"])
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_it_is(tiny_settings, monkeypatch, capsys, how):
    training = {"save_every": 2, "max_steps": 8, "save_total": 2}
    whole = train(tiny_settings("whole", training=training), quiet=True)
    settings = tiny_settings("damaged", training=training)
    with monkeypatch.context() as patch:
        stop_before_step(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(settings, quiet=True)
    folder = settings.run_dir / "checkpoints"
    if how == "cut":
        damage(next((folder / "step-4").glob("*.safetensors")), "cut")
    else:
        Checkpoints(folder, keep=9).save(dataclasses.replace(tiny_state(), step=99))
    capsys.readouterr()
    resumed = train(settings)
    name, goes_on = {"cut": ("step-4", "step-2"), "foreign": ("step-99", "step-4")}[how]
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"warning: \S*{name}: .*resuming from {goes_on} instead", told)
    assert f"resumed at step {goes_on.removeprefix('step-')}" in told
    assert_same_weights(resumed, whole)
    assert untimed(resumed.path) == untimed(whole.path)
    kept = {path.name for path in list_checkpoints(folder)}
    assert kept == {"step-6", "step-8"} | ({"step-99"} if how == "foreign" else set())


def test_where_no_checkpoint_can_be_used_the_newest_is_named_and_nothing_changes(tiny_settings):
    settings = tiny_settings(training={"save_every": 3})
    run = train(settings, quiet=True)
    for path in list_checkpoints(run.checkpoints):
        damage(path / "state.json", "cut")
    before = everything_below(run.path)
    with pytest.raises(SettingsError, match=r"step-6: cannot be read .*1 earlier checkpoints are unusable too"):
        train(tiny_settings(training={"save_every": 3, "max_steps": 9}), quiet=True)
    assert everything_below(run.path) == before


def test_checkpoints_written_in_the_background_are_the_same(tiny_settings):
    one, other = (
        train(tiny_settings(name, training={"save_every": 2, "async_save": name == "background"}), quiet=True)
        for name in ("now", "background")
    )
    for path in list_checkpoints(one.checkpoints):
        written, expected = (load_file(next((run.checkpoints / path.name).glob("*.saf*"))) for run in (other, one))
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_workers_bring_the_same_batches(tiny_settings):
    one, other = (
        train(tiny_settings(f"{n}-workers", model={"dropout": 0.2}, data={"workers": n}), quiet=True) for n in (0, 2)
    )
    assert_same_weights(one, other)


def test_a_checkpoint_is_in_files_of_which_each_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MIN_FILE_BYTES", 2000)
    state = tiny_state()
    path = Checkpoints(tmp_path, keep=1).save(state)
    files = [load_file(file) for file in path.glob("*.safetensors")]
    assert len(files) > 2
    for tensors in files:  # no tensor is cut to fit
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 2000
    monkeypatch.setattr(checkpoint, "MAX_FILES", 1)
    assert len(list(Checkpoints(tmp_path / "one", keep=1).save(state).glob("*.safetensors"))) == 1
    fresh = tiny_state()
    for parameter in fresh.model.parameters():
        nn.init.zeros_(parameter)
    load_checkpoint(path, fresh)
    for parameter, expected in zip(fresh.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    path = Checkpoints(tmp_path, keep=1).save(tiny_state())
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert load_file(next(path.glob("*.safetensors"))).keys() >= {"random.0.cpu", "model.lm_head.weight"}


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_or_infinite_loss_ends_the_run_with_its_position(tiny_settings, monkeypatch, log_every, accumulation):
    training = {"save_every": 2, "log_every": log_every, "gradient_accumulation_steps": accumulation}
    settings = tiny_settings(training=training)
    rows = len(build_rows([(settings.run_dir.parent / "text.txt").read_text()], byte_tokenizer(), 16))
    loss_turns_nan(monkeypatch, 3 * accumulation)
    where = f"from row {3 * accumulation * 4 % rows} of pass {3 * accumulation * 4 // rows + 1}"
    with pytest.raises(TrainingFailed, match=rf"the loss is nan at step 4 \({where} of the data\): .*step-2$"):
        train(settings, quiet=True)
    assert not (settings.run_dir / "model").exists()
    (saved,) = list_checkpoints(settings.run_dir / "checkpoints")
    for name, values in load_file(next(saved.glob("*.safetensors"))).items():
        assert values.isfinite().all(), name


def test_a_gradient_that_is_no_number_is_found_before_it_is_saved(tiny_settings, monkeypatch):
    original = training_step.clip_gradients

    def clip(parameters, max_norm):
        parameters = list(parameters)
        parameters[0].grad[0] = math.inf
        return original(parameters, max_norm)

    monkeypatch.setattr(training_step, "clip_gradients", clip)
    settings = tiny_settings(training={"save_every": 1})
    with pytest.raises(TrainingFailed, match=r"the gradient's norm is inf at step 1 .*no checkpoint was written yet"):
        train(settings, quiet=True)
    assert not list_checkpoints(settings.run_dir / "checkpoints")


def test_nan_or_infinite_steps_are_skipped_up_to_a_bound(tiny_settings, monkeypatch, capsys):
    original, calls = training_step.training_forward, []

    def forward(*arguments):
        calls.append(None)
        output = original(*arguments)
        return {**output, "loss": output["loss"] * (math.nan if len(calls) in (2, 5) else 1)}

    monkeypatch.setattr(training_step, "training_forward", forward)
    training = {"nonfinite": "skip", "max_steps": 6, "save_every": 3}
    run = train(tiny_settings("skips", training={**training, "max_skipped": 2}))
    lines = run.read_metrics()
    assert [line["step"] for line in lines if line["split"] == "skipped"] == [2, 5]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 3, 4, 6]
    assert all(value.isfinite().all() for value in weights(run).values())
    assert "warning: step 2 is skipped" in capsys.readouterr().err
    assert json.loads((run.checkpoints / "step-6" / "state.json").read_text())["skipped"] == 2
    calls.clear()
    with pytest.raises(TrainingFailed, match=r"2 steps up to step 5 had .* more than training\.max_skipped=1"):
        train(tiny_settings("too-many", training={**training, "max_skipped": 1}), quiet=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_after_the_step_and_the_run_resumes_there(tiny_settings, monkeypatch, number):
    training = {"max_steps": 6, "save_every": 0}
    whole = train(tiny_settings("whole", model={"dropout": 0.2}, training=training), quiet=True)
    settings = tiny_settings("stopped", model={"dropout": 0.2}, training=training)
    original, before = training_step.training_forward, signal.getsignal(number)

    def forward(*arguments):
        if len(Run(settings.run_dir).read_metrics()) == 2:  # in the third step
            os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "training_forward", forward)
        with pytest.raises(TrainingStopped) as stopped:
            train(settings, quiet=True)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert [path.name for path in list_checkpoints(settings.run_dir / "checkpoints")] == ["step-3"]
    resumed = train(settings, quiet=True)
    assert_same_weights(resumed, whole)
    assert untimed(resumed.path) == untimed(whole.path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        {"train": []},
        {"train": ["nowhere.txt"]},
        {"validation": ["nowhere.txt"]},
        {"train": ["empty.txt"]},
        {"tokenizer": "nowhere/"},
    ],
)
def test_data_that_cannot_be_used_is_refused_and_nothing_is_written(tiny_settings, tmp_path, data, streaming):
    (tmp_path / "empty.txt").write_text("")
    data = {
        k: [str(tmp_path / name) for name in v] if isinstance(v, list) else f"{tmp_path}/{v}" for k, v in data.items()
    }
    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match=r"no such|no data|data.train is empty|contains no text") as error:
        train(tiny_settings(data={**data, "streaming": streaming}), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert {k: v for k, v in everything_below(tmp_path).items() if k in before} == before


def test_fewer_documents_than_workers_are_refused(tiny_settings):
    with pytest.raises(
        SettingsError, match=r"text.txt has fewer documents than the 2 processes and workers that read them"
    ):
        train(tiny_settings(data={"streaming": True, "workers": 2}), quiet=True)


def test_too_little_text_for_a_batch_is_refused_and_nothing_is_written(tiny_settings, tmp_path):
    (tmp_path / "little.txt").write_text("a few words")
    with pytest.raises(SettingsError, match="fills 1 rows of 16 tokens, fewer than batch_size=4"):
        train(tiny_settings(data={"train": [str(tmp_path / "little.txt")]}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_refused_data_leaves_the_metrics_of_an_earlier_run(tiny_settings, tmp_path, monkeypatch):
    stop_before_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_settings(), quiet=True)
    before = everything_below(tmp_path / "run")
    assert {path.name for path in before} == {"config.yaml", "metrics.jsonl", "history.jsonl", MARKER, LOCK}
    with pytest.raises(SettingsError):
        train(tiny_settings(data={"train": [str(tmp_path / "nowhere.txt")]}), quiet=True)
    assert everything_below(tmp_path / "run") == before


def test_a_row_longer_than_the_model_was_built_for_is_refused(tiny_settings, tmp_path):
    with pytest.raises(SettingsError, match=r"training\.seq_len=16 is longer than model\.max_seq_len=8"):
        train(tiny_settings(model={"max_seq_len": 8}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused(tiny_settings, tmp_path):
    with pytest.raises(SettingsError, match=r"training\.device='abacus': not on this machine"):
        train(tiny_settings(training={"device": "abacus"}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_rate_rises_to_its_peak_and_falls_along_a_cosine_to_its_least():
    settings = Settings.model_validate({"training": {"max_steps": 12, "warmup_steps": 4, "min_lr_ratio": 0.2}})
    scale = [learning_rate_scale(step, settings) for step in range(13)]
    assert_close(scale[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert_close(scale[8], 0.6)  # half way down, from 1 to 0.2
    assert_close(scale[12], 0.2)
    assert all(a > b for a, b in pairwise(scale[4:]))


def test_rate_without_warm_up_starts_at_its_peak_and_a_long_warm_up_never_passes_it():
    assert learning_rate_scale(0, Settings.model_validate({"training": {"max_steps": 3, "warmup_steps": 0}})) == 1
    long = Settings.model_validate({"training": {"max_steps": 3, "warmup_steps": 10}})
    assert_close([learning_rate_scale(step, long) for step in range(3)], [0.1, 0.2, 0.3])


def test_rate_of_metrics_is_the_rate_of_the_schedule(tiny_settings):
    settings = tiny_settings(training={"optimizer": "muon", "learning_rate": 0.01, "min_lr_ratio": 0.0})
    lines = [line for line in train(settings, quiet=True).read_metrics() if line["split"] == "train"]
    assert_close([line["lr"] for line in lines], [0.01 * learning_rate_scale(s, settings) for s in range(6)])


def test_muon_has_the_hidden_matrices_and_adamw_the_rest_each_once():
    model = tiny_state().model
    settings = Settings.model_validate({"training": {"optimizer": "muon", **RATES}})
    adamw, muon = build_optimizers(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(p)] for g in optimizer.param_groups for p in g["params"]] for optimizer in (adamw, muon)]
    assert sorted(groups[0] + groups[1]) == sorted(names.values())
    assert groups[1]
    for name in groups[1]:
        assert model.get_parameter(name).ndim == 2
        assert not any(part in name for part in ("embed", "lm_head", "plan_table", "readout", "norm"))
    assert all(name in groups[1] for name in names.values() if name.endswith("_proj.weight"))
    set_learning_rate([adamw, muon], 0, settings)
    assert {g["lr"] for g in adamw.param_groups} == {0.5}
    assert {g["lr"] for g in muon.param_groups} == {0.25}


def test_weight_decay_is_for_matrices_and_neither_for_norms_nor_for_the_table():
    model = tiny_state().model
    (adamw,) = build_optimizers(model, Settings.model_validate({"optimizer": {"name": "adamw", "weight_decay": 0.3}}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        matrix = model.get_parameter(name).ndim == 2 and "plan_table" not in name
        assert value == (0.3 if matrix else 0.0), name


@pytest.mark.parametrize(
    ("latent_dim", "training", "expected"),
    [
        (12, {}, "adamw"),
        (13, {}, "sparse_adam"),
        (64, {}, "adamw"),  # eight tables of 2^8 rows
        (13, {"table_optimizer": "adamw"}, "adamw"),
        (4, {"table_optimizer": "sparse_adam"}, "sparse_adam"),
        (13, {"compile": True}, "sparse_adam"),
        (13, {"optimizer": "muon"}, "sparse_adam"),
    ],
)
def test_large_codebooks_have_an_optimizer_of_sampled_rows(latent_dim, training, expected):
    settings = Settings.model_validate({"training": {"optimizer": "adamw", **RATES, **training}})
    model = FreeTransformer(FreeTransformerConfig(hidden_dim=8, num_layers=2, num_heads=2, latent_dim=latent_dim))
    optimizers = build_optimizers(model, settings)
    assert codebook_optimizer(model, settings) == expected
    assert model.plan_table.sparse == (expected == "sparse_adam")
    (of_table,) = [
        o for o in optimizers if any(p is model.plan_table.weight for g in o.param_groups for p in g["params"])
    ]
    (group,) = [g for g in of_table.param_groups if any(p is model.plan_table.weight for p in g["params"])]
    assert group.get("by_row", False) == (expected == "sparse_adam")
    assert not any(o.get("by_row") for o in of_table.param_groups if o is not group)
    set_learning_rate(optimizers, 0, settings)
    assert {each["lr"] for each in of_table.param_groups} == {0.5}
    assert codebook_optimizer(build_baseline(model.config), settings) == "adamw"


def test_a_step_updates_only_the_rows_of_sampled_plans(tiny_settings, monkeypatch):
    drawn, forward = [], PlanTable.forward

    def watch(self, plan, plan_logits=None):
        if plan_logits is not None:
            drawn.append(self.group_codes(plan).flatten())
        return forward(self, plan, plan_logits)

    monkeypatch.setattr(PlanTable, "forward", watch)
    model = {"latent_dim": 10, "plan_span": 4}
    training = {"table_optimizer": "sparse_adam", "gradient_accumulation_steps": 2, "eval_every": 0, "seed": 3}
    run = train(tiny_settings(model=model, training=training), quiet=True)
    assert run.settings.optimizer.codebook == "sparse_adam"
    torch.manual_seed(3)
    before = build_model(run.settings, run.load_tokenizer()).plan_table.weight
    moved = (run.load_model().plan_table.weight != before).any(1)
    drawn_rows = torch.zeros_like(moved)
    drawn_rows[torch.cat(drawn)] = True
    assert not (moved & ~drawn_rows).any()
    assert 0.5 * drawn_rows.sum() < moved.sum() < len(moved)  # plans sampled only for padding have no gradient


def test_a_run_with_a_sparse_table_resumes_as_if_never_stopped(tiny_settings, monkeypatch):
    sections = {
        "model": {"latent_dim": 13, "plan_span": 4},
        "training": {"save_every": 2, "gradient_accumulation_steps": 2},
    }
    whole = train(tiny_settings("whole", **sections), quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_before_step(patch, 3)
        train(tiny_settings("stopped", **sections), quiet=True)
    assert_same_weights(train(tiny_settings("stopped", **sections), quiet=True), whole)


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_of_a_sparse_gradient_is_that_of_the_dense_one(max_norm):
    dense, sparse, other = (torch.nn.Parameter(torch.randn(9, 4)) for _ in range(3))
    codes = torch.tensor([[1], [5], [1], [7]])  # row 1 twice
    for table in (dense, sparse):
        for _ in range(2):
            F.embedding_bag(codes, table, mode="sum", sparse=table is sparse).mul(torch.arange(4.0)).sum().backward()
    other.grad = torch.randn_like(other)
    copy = torch.nn.Parameter(other.detach().clone())
    copy.grad = other.grad.clone()
    torch.nn.utils.clip_grad_norm_([dense, copy], max_norm)
    clip_gradients([sparse, other, torch.nn.Parameter(torch.zeros(1))], max_norm)
    assert sparse.grad.is_sparse
    assert_close(sparse.grad.to_dense(), dense.grad)
    assert_close(other.grad, copy.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "training", [{"precision": "bf16"}, {"precision": "auto"}, {"gradient_checkpointing": True}, {"grad_clip": 0}]
)
def test_options_of_training_run_for_both_kinds(tiny_settings, kind, training):
    settings = tiny_settings(model={"kind": kind}, training={**training, "max_steps": 2, "eval_every": 1})
    run = train(settings, quiet=True)
    assert all(
        parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in run.load_model().parameters()
    )


def test_gradient_checkpointing_changes_no_number(tiny_settings):
    plain = train(tiny_settings("plain", model={"dropout": 0.1}), quiet=True)
    saving = tiny_settings("saving", model={"dropout": 0.1}, training={"gradient_checkpointing": True})
    assert_same_weights(train(saving, quiet=True), plain, atol=1e-6, rtol=1e-5)


def test_clipping_bounds_the_norm_of_the_gradient(tiny_settings, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watch(self, *arguments, **kwargs):
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        return step(self, *arguments, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    train(tiny_settings(training={"grad_clip": 0.01}), quiet=True)
    assert len(norms) == 6
    assert max(norms) < 0.0101


def test_free_and_baseline_of_one_seed_read_the_same_batches(tiny_settings, monkeypatch):
    seen = {}
    for kind in KINDS:
        seen[kind] = []
        original = training_step.training_forward

        def watch(model, batch, *others, kind=kind, original=original):
            seen[kind].append(batch["input_ids"])
            return original(model, batch, *others)

        with monkeypatch.context() as patch:
            patch.setattr(training_step, "training_forward", watch)
            train(tiny_settings(kind, model={"kind": kind}), quiet=True)
    assert len(seen["free"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen["free"], seen["baseline"], strict=True))


def test_the_configuration_that_a_run_writes_says_which_gradient_the_plan_had(tiny_settings):
    run = train(tiny_settings(training={"max_steps": 1}), quiet=True)
    assert run.settings.model.model_extra == {"plan_gradient": "exact"}


def test_streaming_trains_on_the_text_of_the_source(tiny_settings, tmp_path):
    settings = tiny_settings(data={"streaming": True, "shuffle_buffer": 4}, training={"max_steps": 2})
    train(settings, quiet=True)
    batch = next(streamed_batches([[(tmp_path / "text.txt").read_text()]], [1.0], byte_tokenizer(), 16, 4, 4, seed=0))
    assert isinstance(batch, dict) and not isinstance(batch, Rows)
    assert batch["input_ids"].shape == (4, 16)


def test_a_line_of_metrics_that_a_crash_cut_short_is_left_out(tmp_path):
    run = Run(tmp_path)
    run.append_metrics(step=1, loss=2.0)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1, "loss": 2.0}]
    run.forget_metrics_after(5)
    assert run.metrics_file.read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("method", ["load_model", "settings"])
def test_a_folder_that_is_no_run_or_has_no_model_yet_says_so(tmp_path, tiny_settings, method):
    with pytest.raises(SettingsError, match="not a run"):
        _ = Run(tmp_path / "nowhere").settings if method == "settings" else Run(tmp_path / "nowhere").load_model()
    run = Run(tmp_path / "early")
    run.write_config(tiny_settings())
    with pytest.raises(SettingsError, match="has no model yet"):
        run.load_model()
