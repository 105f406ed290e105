"""Stages, mixtures, the best checkpoint and early stopping."""

import json
import shutil
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_training import assert_same_weights, stop_before_step, tiny_settings, weights  # noqa: F401
from torch.testing import assert_close

from free_transformer.data import build_rows, byte_tokenizer, streamed_batches
from free_transformer.data.rows import MixedRows, Rows, SourceOrder
from free_transformer.runs.load_model import load_pretrained
from free_transformer.settings import parse_settings
from free_transformer.settings.curriculum import stage_at, stages_of
from free_transformer.training import SettingsError, loop, train
from free_transformer.training import step as training_step
from free_transformer.training.checkpoint import list_checkpoints
from processes import untimed

STAGES = [
    {"steps": 2, "seq_len": 8, "free_bits": 1.0},
    {"steps": 2, "kl_weight": 0.5},
    {"steps": 1, "seq_len": 8},
    {"data": {"SIMPLE": 1, "TEXT": 3}},
]


@pytest.fixture
def staged(tiny_settings, tmp_path):  # noqa: F811
    """A run of eight steps in four stages, which differ in length, in weights and in their text."""
    (tmp_path / "simple.txt").write_text("ab" * 60)
    names = {"SIMPLE": str(tmp_path / "simple.txt"), "TEXT": str(tmp_path / "text.txt")}
    stages = [dict(stage) for stage in STAGES]
    stages[-1]["data"] = {names[name]: share for name, share in stages[-1]["data"].items()}

    def build(name="run", data=None, **training):
        training = {"max_steps": 8, "stages": stages, "eval_every": 3, **training}
        return tiny_settings(name, training=training, data=data or {})

    return build


def stages(max_steps, *listed, **training):
    values = {"max_steps": max_steps, "batch_size": 4, "seq_len": 32, "stages": list(listed), **training}
    return stages_of(parse_settings({"training": values, "data": {"train": ["a.txt"]}}))


def test_a_run_without_stages_has_one():
    (only,) = stages(7)
    assert (only.start, only.end, only.batch_size, only.seq_len) == (0, 7, 4, 32)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(6, 60))
def test_stages_follow_one_another_and_fill_the_run(steps, max_steps):
    steps[-1] = 0
    if sum(steps) + steps.count(0) > max_steps:
        with pytest.raises(SettingsError, match="steps add up to"):
            stages(max_steps, *({"steps": each} for each in steps))
        return
    found = stages(max_steps, *({"steps": each} for each in steps))
    assert found[0].start == 0 and found[-1].end == max_steps
    assert all(one.end == other.start for one, other in pairwise(found))
    assert all(stage.end - stage.start == each for stage, each in zip(found, steps, strict=True) if each)
    equal = [stage.end - stage.start for stage, each in zip(found, steps, strict=True) if not each]
    assert max(equal) - min(equal) <= 1
    for step in range(max_steps):
        stage = stage_at(found, step)
        assert stage.start <= step < stage.end


@pytest.mark.parametrize("seq_len", [2, 4, 8, 16, 32])
def test_tokens_of_a_step_stay_the_same(seq_len):
    first, last = stages(4, {"seq_len": seq_len}, {})
    assert first.seq_len * first.batch_size == last.seq_len * last.batch_size == 128


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"stages": [{"seq_len": 64}]}, r"curriculum.stages.0.seq_len=64: must be at most training.seq_len=32"),
        ({"stages": [{"steps": 3}, {"steps": 9}]}, "steps add up to 12, but training.max_steps=10"),
        ({"stages": [{"steps": 3}, {"steps": 4}]}, "leave out the steps of the last stage"),
        ({"stages": [{"steps": 10}, {}]}, "steps add up to 10, with 1 stages without steps"),
        (
            {"stages": [{"kl_weight": 1}], "kl_schedule": "linear"},
            "stages.0.kl_weight: needs curriculum.kl_schedule=constant",
        ),
        ({"stages": [{"sequence": 8}]}, r"unknown setting 'curriculum.stages.0.sequence': did you mean 'seq_len'"),
        ({"stages": [{"data": {"a.txt": 0}}]}, r"greater than 0"),
        ({"stages": {"seq_len": 8}}, "curriculum.stages="),
        ({"early_stopping": 2}, "need evaluations: set data.validation"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_a_line(training, message):
    with pytest.raises(SettingsError, match=message) as error:
        parse_settings({"training": {"max_steps": 10, "seq_len": 32, **training}, "data": {"train": ["a.txt"]}})
    assert "\n" not in str(error.value)


def test_free_bits_of_a_stage_under_min_bits_are_refused():
    values = {"model": {"free_bits": 2, "min_bits": 1.5}, "training": {"stages": [{"free_bits": 1}, {}]}}
    with pytest.raises(SettingsError, match=r"curriculum.stages.0.free_bits=1.0: must be at least model.min_bits=1.5"):
        parse_settings(values)


def test_each_step_has_the_length_the_text_and_the_weights_of_its_stage(staged, monkeypatch):
    seen, original = [], training_step.training_forward

    def forward(model, batch, num_tokens, given):
        seen.append((tuple(batch["input_ids"].shape), {name: float(value) for name, value in given.items()}))
        return original(model, batch, num_tokens, given)

    monkeypatch.setattr(training_step, "training_forward", forward)
    run = train(staged(), quiet=True)
    base = {"kl_weight": 1.0, "free_bits": 0.25}
    assert seen[:2] == [((8, 8), {"kl_weight": 1.0, "free_bits": 1.0})] * 2
    assert seen[2:4] == [((4, 16), {"kl_weight": 0.5, "free_bits": 0.25})] * 2
    assert seen[4] == ((8, 8), base)
    assert seen[5:] == [((4, 16), base)] * 3
    assert [line["stage"] for line in run.read_metrics() if line["split"] == "train"] == [1, 1, 2, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("data", [{}, {"streaming": True, "shuffle_buffer": 3}, {"workers": 2}])
@pytest.mark.parametrize("stop", range(1, 8))
def test_resuming_in_and_between_stages_is_the_same_as_not_stopping(staged, monkeypatch, data, stop):
    training = {"save_every": 1, "gradient_accumulation_steps": 2}
    whole = train(staged("whole", data, **training), quiet=True)
    with monkeypatch.context() as patch:
        stop_before_step(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(staged("stopped", data, **training), quiet=True)
    resumed = train(staged("stopped", data, **training), quiet=True)
    assert_same_weights(resumed, whole)
    assert untimed(resumed.path) == untimed(whole.path)


def test_a_stage_with_only_other_weights_continues_in_the_same_text(tiny_settings, monkeypatch):  # noqa: F811
    read, original = [], training_step.training_forward

    def forward(model, batch, *others):
        read.append(batch["input_ids"])
        return original(model, batch, *others)

    monkeypatch.setattr(training_step, "training_forward", forward)
    train(tiny_settings("plain"), quiet=True)
    train(tiny_settings("staged", training={"stages": [{"kl_weight": 0.1}, {"free_bits": 2}, {}]}), quiet=True)
    assert len(read) == 12
    assert all(torch.equal(one, other) for one, other in zip(read[:6], read[6:], strict=True))


def mixture(*shares: float) -> MixedRows:
    """Rows of different letters, so that a batch shows its sources."""
    texts = [chr(97 + i) * 39 for i in range(len(shares))]
    total = sum(shares)
    return MixedRows([build_rows([text], byte_tokenizer(), 9) for text in texts], [share / total for share in shares])


def letters_in(batch) -> np.ndarray:
    return batch["input_ids"][:, 1].numpy() - 97


def test_a_mixture_is_sampled_in_its_shares():
    batches = islice(mixture(1, 3).shuffled(16, seed=0), 200)
    share = np.concatenate([letters_in(batch) for batch in batches]).mean()
    assert abs(share - 0.75) < 3 * np.sqrt(0.75 * 0.25 / 3200)


def numbered_mixture(*sizes: int) -> MixedRows:
    """Sources of so many rows, each with its source and its number in its tokens; each source twice as frequent."""
    parts = [
        Rows(
            np.array([[source, row] for row in range(size)], np.int32),
            np.tile(np.arange(2, dtype=np.int32), (size, 1)),
            0,
        )
        for source, size in enumerate(sizes)
    ]
    shares = [2**source / (2 ** len(sizes) - 1) for source in range(len(sizes))]
    return MixedRows(parts, shares)


def rows_read(batches) -> list[tuple[int, int]]:
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


@given(st.integers(0, 9000), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_any_row_of_a_mixture_is_reached_at_once_whoever_reads_it(start, batch_size, workers, seed):
    rows = numbered_mixture(5, 3, 200)
    whole = [rows_read([batch]) for batch in islice(rows.shuffled(batch_size, seed, start), 3 * workers)]
    for worker in range(workers):
        own = rows.shuffled(batch_size, seed, start, worker, workers)
        assert [rows_read([batch]) for batch in islice(own, 3)] == whole[worker::workers]
    half = batch_size // 2
    shared = [
        next(rows.shuffled(batch_size, seed, start, share=share)) for share in (slice(0, half), slice(half, None))
    ]
    assert rows_read(shared) == whole[0]


@given(st.integers(0, 9000), st.integers(1, 300), st.integers(1, 40), st.integers(0, 3))
@example(start=10, first_size=9000, second_size=7, seed=0)
def test_the_rows_of_a_mixture_do_not_depend_on_the_size_of_its_batches(start, first_size, second_size, seed):
    rows = numbered_mixture(5, 3, 200)
    count = first_size + 3 * second_size
    batches = [next(rows.shuffled(first_size, seed, start))]
    batches += islice(rows.shuffled(second_size, seed, start + first_size), 3)
    assert Counter(rows_read(batches)) == Counter(rows_read([next(rows.shuffled(count, seed, start))]))
    assert Counter(rows_read(batches)) == Counter(rows_read(islice(rows.shuffled(1, seed, start), count)))


def test_every_row_of_a_source_is_read_before_one_is_read_again():
    rows = numbered_mixture(5, 3, 200)
    read = rows_read(islice(rows.shuffled(7, seed=1), 1500))
    for source, part in enumerate(rows.parts):
        times = Counter(row for drawn, row in read if drawn == source)
        assert set(times) == set(range(len(part)))
        assert max(times.values()) - min(times.values()) <= 1


def test_sources_are_sampled_per_row_and_not_in_turn():
    """How often a source occurs among 64 rows varies like a sum of 64 independent draws."""
    order = SourceOrder([0.25, 0.75], seed=0)
    counts = np.diff([order.taken_before(place)[0] for place in range(0, 64 * 3000, 64)])
    assert abs(counts.mean() - 16) < 3 * np.sqrt(12 / 3000)
    assert abs(counts.var() / 12 - 1) < 0.15
    assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) < 0.06


@pytest.mark.parametrize("shares", [[1.0], [0.0, 1.0], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("place", [0, 4095, 4096, 4097, 3 * 4096, 5000 * 4096 + 5])
def test_a_far_place_has_the_sources_of_coming_to_it_step_by_step(shares, place):
    stepping = SourceOrder(shares, seed=3)
    for before in range(0, place, 100_003):
        stepping.taken_before(before)
    far = SourceOrder(shares, seed=3)
    assert far.taken_before(place).tolist() == stepping.taken_before(place).tolist()
    assert far.taken_before(place + 7).sum() == place + 7
    assert all(count == 0 for count, share in zip(far.taken_before(place + 7), shares, strict=True) if share == 0)


def test_batches_of_a_mixture_draw_each_epoch_of_a_source_once(monkeypatch):
    """However many rows a source has, a batch costs what its own rows cost."""
    drawn, original = [], np.random.default_rng

    def default_rng(seed):
        drawn.append(tuple(seed))
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    rows = numbered_mixture(50, 100_000)
    for _ in islice(rows.shuffled(32, seed=0, start=10**9), 300):
        pass
    assert len(drawn) == len(set(drawn))
    assert [seed[1] for seed in drawn].count(1) == 1  # one epoch of the large source
    assert len(drawn) < 10**9 / 4096 / 100  # blocks before the first row are passed over together


def test_streamed_mixtures_have_their_shares_and_start_at_any_row():
    arguments = ([["a" * 39], ["b" * 39]], [0.25, 0.75], byte_tokenizer(), 9)
    whole = np.concatenate([letters_in(batch) for batch in islice(streamed_batches(*arguments, 8, 3, seed=1), 60)])
    assert abs(whole.mean() - 0.75) < 0.07
    for start, batch_size in ((56, 8), (7, 5), (33, 1)):
        later = next(streamed_batches(*arguments, batch_size, 3, seed=1, start=start))
        assert letters_in(later).tolist() == whole[start : start + batch_size].tolist()


def held_out_losses(monkeypatch, losses: list[float]) -> None:
    """Validations come out like this, one after the other."""
    original, left = loop.evaluate_likelihood, list(losses)

    def evaluate(*arguments, **options):
        result = original(*arguments, **options)
        result.elbo = left.pop(0)
        return result

    monkeypatch.setattr(loop, "evaluate_likelihood", evaluate)


@pytest.mark.parametrize(
    ("losses", "ends", "best"),
    [
        ([5, 4, 3, 2, 1, 0.5], 6, 6),
        ([5, 3, 4, 4, 1, 1], 4, 2),
        ([5, 3, 4, 2.5, 3, 3], 6, 4),
        ([1, 1, 1, 0, 0, 0], 3, 1),
    ],
)
def test_a_run_stops_when_validations_are_no_better_and_its_model_is_the_best(
    tiny_settings,  # noqa: F811
    monkeypatch,
    losses,
    ends,
    best,
):
    held_out_losses(monkeypatch, losses)
    training = {"eval_every": 1, "early_stopping": 2, "save_total": 1, "save_every": 0}
    run = train(tiny_settings(training=training), quiet=True)
    assert max(line["step"] for line in run.read_metrics()) == ends
    assert json.loads((run.checkpoints / "best.json").read_text()) == {
        "checkpoint": f"step-{best}",
        "loss": losses[best - 1],
    }
    assert {path.name for path in list_checkpoints(run.checkpoints)} >= {f"step-{best}", f"step-{ends}"}
    assert len(list_checkpoints(run.checkpoints)) <= 2
    before = (run.model_folder / "model.safetensors").read_bytes()
    assert run.has_ended
    train(tiny_settings(training=training), quiet=True)  # started again it stays as it is, without a validation
    assert (run.model_folder / "model.safetensors").read_bytes() == before


def test_the_best_weights_are_those_of_its_step(tiny_settings, monkeypatch):  # noqa: F811
    stopped = []
    original = loop._Trainer._optimizer_step

    def optimizer_step(self, *arguments):
        if self.state.step == 2:
            stopped.append({name: value.clone() for name, value in self.state.model.named_parameters()})
        return original(self, *arguments)

    monkeypatch.setattr(loop._Trainer, "_optimizer_step", optimizer_step)
    held_out_losses(monkeypatch, [3, 1, 2, 2, 2, 2])
    training = {"eval_every": 1, "keep_best": True, "prior_rows": 0}
    run = train(tiny_settings(training=training), quiet=True)
    found = dict(load_pretrained(run.model_folder).named_parameters())
    for name, value in stopped[0].items():
        assert_close(found[name], value, atol=0, rtol=0)


def test_a_stopped_run_that_keeps_its_best_resumes_as_if_uninterrupted(tiny_settings, monkeypatch):  # noqa: F811
    training = {"eval_every": 1, "early_stopping": 3, "save_every": 1, "save_total": 1}
    losses = [5, 2, 3, 3, 1, 2]
    with monkeypatch.context() as patch:
        held_out_losses(patch, losses)
        whole = train(tiny_settings("whole", training=training), quiet=True)
    with monkeypatch.context() as patch:
        held_out_losses(patch, losses)
        stop_before_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings("stopped", training=training), quiet=True)
    assert {path.name for path in list_checkpoints(whole.path.parent / "stopped" / "checkpoints")} == {
        "step-2",
        "step-4",
    }
    held_out_losses(monkeypatch, losses[4:])
    resumed = train(tiny_settings("stopped", training=training), quiet=True)
    assert_same_weights(resumed, whole)
    assert untimed(resumed.path) == untimed(whole.path)


def test_only_the_last_stage_counts_for_stopping(tiny_settings, monkeypatch):  # noqa: F811
    held_out_losses(monkeypatch, [1, 2, 2, 5, 4, 3])
    training = {"eval_every": 1, "early_stopping": 2, "stages": [{"steps": 3, "seq_len": 8}, {}]}
    run = train(tiny_settings(training=training), quiet=True)
    assert json.loads((run.checkpoints / "best.json").read_text())["checkpoint"] == "step-6"


def test_a_best_checkpoint_that_is_gone_is_said_and_the_last_weights_written(tiny_settings, monkeypatch, capsys):  # noqa: F811
    held_out_losses(monkeypatch, [1, 2, 2, 2, 2, 2])
    original = loop.load_best_weights

    def load_best_weights(run, *others):
        shutil.rmtree(run.checkpoints / "step-1")
        original(run, *others)

    monkeypatch.setattr(loop, "load_best_weights", load_best_weights)
    run = train(tiny_settings(training={"eval_every": 1, "keep_best": True, "save_every": 0}))
    assert "the best checkpoint, is missing" in " ".join(capsys.readouterr().err.split())
    assert weights(run)
