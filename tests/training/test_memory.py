"""Before a run: rows that fit in memory, memory and time; and precisions."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import assert_same_weights, stop_before_step, tiny_settings  # noqa: F401

from free_transformer.data import byte_tokenizer
from free_transformer.distributed.processes import Processes
from free_transformer.training import SettingsError, train
from free_transformer.training import batch_size as memory
from free_transformer.training import state as build
from free_transformer.training import step as training_step
from free_transformer.training.batch_size import StepCosts, Trial, decide_batch_size, memory_budget, try_steps
from free_transformer.training.batches import load_training
from free_transformer.training.checkpoint import Checkpoints, load_checkpoint
from free_transformer.training.optimizers import describe_groups
from free_transformer.training.preview import parameters_by_part, preview
from free_transformer.training.state import new_state

MIB = 2**20


def costs(fixed=100, row=3, sizes=(1, 2, 4, 8)) -> StepCosts:
    return StepCosts([Trial(n, (fixed + row * n) * MIB, 0.1 + 0.01 * n) for n in sizes], state_bytes=fixed * MIB)


@given(st.integers(0, 500), st.integers(1, 50), st.integers(1, 4000))
def test_costs_grow_by_the_row(fixed, row, rows):
    found = costs(fixed, row)
    assert found.bytes(rows) == pytest.approx((fixed + row * rows) * MIB)


@given(st.integers(0, 500), st.integers(1, 50), st.integers(50, 9000))
def test_the_most_rows_fit_and_one_more_would_not(fixed, row, budget):
    found = costs(fixed, row)
    rows = found.max_rows(budget * MIB)
    assert rows == 0 or found.bytes(rows) <= budget * MIB
    if rows >= 8:
        assert found.bytes(rows + 1) > budget * MIB


def resolved(settings, run=None) -> int:
    return decide_batch_size(settings, byte_tokenizer(), Processes(torch.device("cpu")), run, True)[0].training.rows


def test_auto_takes_the_rows_that_fit_into_the_free_memory_with_a_margin(tiny_settings, monkeypatch):  # noqa: F811
    monkeypatch.setattr(memory, "try_steps", lambda *arguments: costs(fixed=100, row=3))
    monkeypatch.setattr(memory, "_resident_bytes", lambda: 90 * MIB)
    monkeypatch.setattr(memory, "_free_bytes", lambda: 100 * MIB)
    settings = tiny_settings(training={"batch_size": "auto"})
    assert resolved(settings) == 23  # 90 + 0.8 * 100 = 170 >= 100 + 3 * 23
    monkeypatch.setattr(memory, "_free_bytes", lambda: 100_000 * MIB)
    rows = len(load_training(tiny_settings(), byte_tokenizer(), Processes(torch.device("cpu")))[0])
    assert resolved(settings) == rows  # the text has no more


def test_auto_ends_where_a_gpu_runs_out_of_memory(tiny_settings, monkeypatch):  # noqa: F811
    original, tried = memory.compute_gradients, []

    def compute_gradients(state, micro, *arguments):
        rows = len(micro[0]["input_ids"])
        tried.append(rows)
        if rows > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(state, micro, *arguments)

    monkeypatch.setattr(memory, "compute_gradients", compute_gradients)
    settings, alone = tiny_settings(), Processes(torch.device("cpu"))
    found = try_steps(settings, byte_tokenizer(), alone, load_training(settings, byte_tokenizer(), alone), 64)
    assert [trial.rows for trial in found.trials] == [1, 2, 4]
    assert tried == [1, 1, 2, 2, 4, 4, 8]


def test_a_run_with_auto_says_and_keeps_its_number(tiny_settings, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(memory, "try_steps", lambda *arguments: costs(fixed=0, row=10))
    monkeypatch.setattr(memory, "_free_bytes", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "_resident_bytes", lambda: 0)
    training = {"batch_size": "auto", "save_every": 2}
    whole = train(tiny_settings("whole", training=training))
    assert "training.batch_size=auto: 8 rows" in capsys.readouterr().err
    assert whole.settings.training.batch_size == 8
    assert_same_weights(whole, train(tiny_settings("named", training={"batch_size": 8}), quiet=True))
    with monkeypatch.context() as patch:
        stop_before_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings("stopped", training=training), quiet=True)
    monkeypatch.setattr(memory, "_free_bytes", lambda: 50 * MIB)  # another machine, the same run
    assert_same_weights(train(tiny_settings("stopped", training=training), quiet=True), whole)


def test_trying_steps_changes_nothing_of_the_run(tiny_settings):  # noqa: F811
    one = train(tiny_settings("auto", training={"batch_size": "auto"}), quiet=True)
    rows = one.settings.training.rows
    assert_same_weights(one, train(tiny_settings("named", training={"batch_size": rows}), quiet=True))


def test_a_model_that_cannot_fit_is_refused_before_it_is_tried(tiny_settings, monkeypatch):  # noqa: F811
    monkeypatch.setattr(memory, "memory_budget", lambda processes: 1000)
    with pytest.raises(SettingsError, match="use a smaller model"):
        resolved(tiny_settings(training={"batch_size": "auto"}))


def test_the_budget_is_within_the_machine():
    assert 0 < memory_budget(Processes(torch.device("cpu"))) < 2**50


@pytest.mark.parametrize("kind", ["free", "baseline"])
def test_a_preview_counts_and_writes_nothing(tiny_settings, kind):  # noqa: F811
    training = {"stages": [{"seq_len": 8, "steps": 2}, {}], "gradient_accumulation_steps": 2}
    settings = tiny_settings(model={"kind": kind}, training=training)
    found = preview(settings, quiet=True)
    model = build.build_model(settings, byte_tokenizer())
    assert sum(found.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert ("encoder" in found.parameters) == (kind == "free")
    assert found.tokens_per_step == 2 * 4 * 16
    assert [stage.batch_size for stage in found.stages] == [8, 4]
    assert found.bytes > found.costs.state_bytes and not found.warnings
    assert found.time.steps == memory.TIMED_STEPS and found.time.seconds > 0
    assert not settings.run_dir.exists()


def test_a_preview_times_whole_optimizer_steps_of_the_run(tiny_settings, monkeypatch):  # noqa: F811
    rows, clock = [], iter([0.0, 100.0, 200.0, 201.0, 300.0, 303.0, 400.0, 408.0])
    monkeypatch.setattr(memory, "try_steps", lambda *arguments: costs())
    monkeypatch.setattr("free_transformer.training.preview.try_steps", memory.try_steps)
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    original = memory.compute_gradients

    def compute_gradients(state, micro, *arguments):
        rows.append([len(batch["input_ids"]) for batch in micro])
        return original(state, micro, *arguments)

    monkeypatch.setattr(memory, "compute_gradients", compute_gradients)
    found = preview(tiny_settings(training={"gradient_accumulation_steps": 2}), quiet=True)
    assert rows == [[4, 4]] * 4  # rows per micro-batch; the first step is not counted
    assert (found.time.steps, found.time.seconds) == (3, 4.0)


def test_a_preview_of_auto_tries_its_steps_once(tiny_settings, monkeypatch):  # noqa: F811
    calls = []
    monkeypatch.setattr(memory, "try_steps", lambda *arguments: calls.append(1) or costs(fixed=100, row=3))
    monkeypatch.setattr("free_transformer.training.preview.try_steps", memory.try_steps)
    found = preview(tiny_settings(training={"batch_size": "auto"}), quiet=True)
    assert len(calls) == 1 and found.bytes == found.costs.bytes(found.rows)


def test_a_preview_warns_of_what_will_not_fit(tiny_settings, monkeypatch):  # noqa: F811
    monkeypatch.setattr("free_transformer.training.preview.memory_budget", lambda processes: 10)
    found = preview(tiny_settings(), quiet=True)
    assert "does not fit in memory" in found.warnings[0] and found.time is None
    assert "time" not in str(found.cost_table().rows)


def test_parts_are_those_of_the_model(tiny_settings):  # noqa: F811
    model = build.build_model(tiny_settings(), byte_tokenizer())
    parts = parameters_by_part(model)
    assert parts["codebook"] == model.plan_table.weight.numel()
    assert parts["encoder"] == sum(parameter.numel() for parameter in model.encoder.parameters())
    assert parts["layers before the plan"] == sum(parameter.numel() for parameter in model.model.layers[0].parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_hold_every_parameter_once_and_decay_matrices_alone(tiny_settings, optimizer):  # noqa: F811
    settings = tiny_settings(training={"optimizer": optimizer, "weight_decay": 0.3, "learning_rate": 1e-3})
    state = new_state(settings, byte_tokenizer(), Processes(torch.device("cpu")))
    found = [each for optimizer in state.optimizers for group in optimizer.param_groups for each in group["params"]]
    assert sorted(map(id, found)) == sorted(map(id, state.model.parameters()))
    words = describe_groups(state.optimizers)
    assert sum(int(each.split()[1].replace(",", "")) for each in words) == sum(each.numel() for each in found)
    assert any("no decay" in each for each in words) and any("decay 0.3" in each for each in words)
    assert any(each.startswith("Muon") for each in words) == (optimizer == "muon")
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            if group.get("weight_decay"):
                assert all(each.ndim >= 2 and each is not state.model.plan_table.weight for each in group["params"])


def test_fp16_on_a_cpu_is_refused_with_the_reason_before_anything_is_written(tiny_settings):  # noqa: F811
    settings = tiny_settings(training={"precision": "fp16"})
    with pytest.raises(SettingsError, match=r"training.precision=fp16 on cpu: .* use bf16 or fp32") as error:
        train(settings, quiet=True)
    assert "\n" not in str(error.value) and not settings.run_dir.exists()


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """As on a GPU: what is refused on a CPU can be computed there, and so the scaling be tried."""
    monkeypatch.setattr(training_step, "computing_dtype", lambda precision, processes: torch.float16)
    monkeypatch.setattr(build, "computing_dtype", lambda precision, processes: torch.float16)


def test_fp16_scales_its_losses_and_learns(tiny_settings, fp16_on_cpu):  # noqa: F811
    training = {"precision": "fp16", "max_steps": 40, "learning_rate": 1e-2}
    lines = train(tiny_settings(training=training), quiet=True).read_metrics()
    losses = [line["reconstruction"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    scales = [line["loss_scale"] for line in lines if line["split"] == "train"]
    assert min(scales) >= 1 and len(losses) > 30  # the first scales may be too high: those steps are left out


def test_fp16_resumes_with_its_scale(tiny_settings, fp16_on_cpu, tmp_path):  # noqa: F811
    settings = tiny_settings(training={"precision": "fp16"})
    one, other = (new_state(settings, byte_tokenizer(), Processes(torch.device("cpu"))) for _ in range(2))
    loss = one.scaler.scale(sum(parameter.sum() for parameter in one.model.parameters()))
    loss.backward()
    training_step.apply_gradients(one)
    one.scaler.update(512.0)
    load_checkpoint(Checkpoints(tmp_path / "checkpoints", 1).save(one), other)
    assert other.scaler.get_scale() == 512.0


def test_gradients_that_never_fit_into_fp16_end_the_run(tiny_settings, fp16_on_cpu, monkeypatch):  # noqa: F811
    original = training_step.clip_gradients
    monkeypatch.setattr(training_step, "clip_gradients", lambda *arguments: original(*arguments) * float("inf"))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        train(tiny_settings(training={"precision": "fp16", "max_steps": 100}), quiet=True)


def test_bf16_runs_anywhere(tiny_settings):  # noqa: F811
    lines = train(tiny_settings(training={"precision": "bf16", "max_steps": 2}), quiet=True).read_metrics()
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
