"""Messages about a run during training, and trackers."""

import io
import json
import math
import re
import sqlite3
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_training import stop_before_step, tiny_settings  # noqa: F401

from free_transformer.files import update_marker, write_json, write_text
from free_transformer.model.losses import kl_bits_per_bit, predicted_tokens
from free_transformer.reporting.plots import curves
from free_transformer.runs.diagnostics import WINDOW
from free_transformer.runs.monitor import Monitor
from free_transformer.runs.report import write_run_report
from free_transformer.runs.run import Run
from free_transformer.runs.subscribers import Subscriber
from free_transformer.runs.watch import _fitting, watch
from free_transformer.settings import parse_settings
from free_transformer.training import SettingsError, train
from free_transformer.training import step as training_step
from free_transformer.training.start import PreparedRun
from processes import untimed

FREE = ["reconstruction", "KL", "KL beyond the free bits", "prior gap", "live bits", "held-out ELBO"]
FREE += ["gradient norm", "spikes"]


def settings_of(kind="free", **training):
    values = {"max_steps": 1000, "warmup_steps": 10, **training}
    model = {"kind": kind, "free_bits": 2.0, "min_bits": 0.0, "latent_dim": 8}
    return parse_settings({"model": model, "training": values})


def lines_of(count=30, start=200, **changes):
    """Lines of a run that is well, the last ten with these changes."""
    for index in range(count):
        step = start + 10 * index
        line = {"step": step, "split": "train", "loss": 3 * 0.99**index, "reconstruction": 3 * 0.99**index}
        line |= {"kl": 2.1, "kl_hinge": 0.1, "live_bits": 6, "grad_norm": 0.8, "spikes": 0}
        yield line | (changes if index >= count - WINDOW else {})


def alarms(*lines, **training) -> list[str]:
    return [diagnostic.label for diagnostic in Monitor(settings_of(**training), lines).alarms()]


def test_every_figure_has_a_value_and_a_sentence():
    diagnostics = Monitor(settings_of(), lines_of()).diagnostics()
    assert [diagnostic.label for diagnostic in diagnostics] == FREE
    assert all(diagnostic.advice and diagnostic.value and not diagnostic.alarm for diagnostic in diagnostics)


def test_a_baseline_has_the_figures_of_a_baseline():
    labels = [diagnostic.label for diagnostic in Monitor(settings_of(kind="baseline"), lines_of()).diagnostics()]
    assert labels == ["reconstruction", "held-out NLL", "gradient norm", "spikes"]


@pytest.mark.parametrize(
    ("changes", "label", "advice"),
    [
        ({"reconstruction": 4.0}, "reconstruction", "learning_rate"),
        ({"kl": 0.1}, "KL", "free_bits"),
        ({"kl_hinge": 3.0}, "KL beyond the free bits", "kl_weight"),
        ({"live_bits": 0}, "live bits", "free_bits"),
        ({"grad_norm": 30.0}, "gradient norm", "grad_clip"),
        ({"spikes": 2}, "spikes", "learning_rate"),
    ],
)
def test_what_goes_wrong_is_said_with_what_to_do_but_not_in_the_first_steps(changes, label, advice):
    monitor = Monitor(settings_of(), lines_of(**changes))
    assert [diagnostic.label for diagnostic in monitor.alarms()] == [label]
    assert advice in monitor.alarms()[0].advice
    early = alarms(*lines_of(count=20, start=-100, **changes))  # ends at step 90 of 1000
    assert early == ([label] if label == "spikes" else [])


@pytest.mark.parametrize(
    ("max_steps", "warmup_steps", "plan_steps"),
    [(600, 50, 300), (1150, 55, 300), (100, 10, 50), (10_000, 100, 1000), (1000, 400, 400)],
)
def test_an_unused_plan_is_normal_in_the_first_300_steps(max_steps, warmup_steps, plan_steps):
    monitor = Monitor(settings_of(max_steps=max_steps, warmup_steps=warmup_steps))
    assert [monitor.plan_may_be_unused(step) for step in (1, plan_steps, plan_steps + 1)] == [True, True, False]


def test_a_longer_warm_up_is_advised_near_the_warm_up_alone():
    near = Monitor(settings_of(), lines_of(count=12, start=60, spikes=2)).alarms()  # to step 170 of 1000
    late = Monitor(settings_of(), lines_of(spikes=2)).alarms()
    assert "warmup_steps" in near[0].advice and "warmup_steps" not in late[0].advice


def test_advice_names_neither_settings_in_use_nor_a_smaller_latent_dim():
    model = {"free_bits": 0.45, "min_bits": 0.0, "plan_span": 1}
    sections = {"model": model, "optimizer": {"name": "adamw"}, "training": {"max_steps": 1000, "warmup_steps": 10}}
    collapsed = {"kl": 0.01, "live_bits": 0}
    alarms = Monitor(parse_settings(sections), lines_of(**collapsed)).alarms()
    assert [alarm.label for alarm in alarms] == ["KL", "live bits"]
    for alarm in alarms:
        assert "raise model.free_bits" in alarm.advice
        assert "min_bits" not in alarm.advice  # which fills several plans of a text with noise (docs/plan.md)
        assert "optimizer.name=muon" in alarm.advice and "model.plan_span" in alarm.advice
    model |= {"free_bits": 2.0, "min_bits": 1.8, "aggregate_weight": 1.0, "plan_span": "sequence"}
    advised = Monitor(parse_settings(sections | {"optimizer": {"name": "muon"}}), lines_of(**collapsed)).diagnostics()
    for diagnostic in advised:
        assert not any(name in diagnostic.advice for name in ("min_bits", "muon", "plan_span", "latent_dim"))


def test_validations_that_are_no_better_and_a_plan_that_is_not_used_are_said():
    validations = [{"step": 500 + i, "split": "validation", "loss": 2.0 + i, "gap": 0.0} for i in range(4)]
    assert alarms(*lines_of(), *validations) == ["held-out ELBO"]
    collapsed = {"step": 503, "split": "watcher", "collapsed": True, "warning": "the plan is not used"}
    assert alarms(*lines_of(), *validations[:1], collapsed) == ["prior gap"]
    assert alarms(*lines_of(), collapsed, {**collapsed, "collapsed": False}) == []


@given(
    st.lists(st.floats(0.5, 1.5), min_size=1, max_size=10),
    st.lists(st.integers(0, 9), max_size=3, unique=True),
    st.booleans(),
)
def test_steps_far_above_those_before_are_counted(losses, where, of_the_loss):
    monitor = Monitor(settings_of(), lines_of())
    usual = statistics.median(line["loss"] for line in monitor.history.train)
    losses, norms = [usual * min(each, 1.4) for each in losses], [0.8 * each for each in losses]
    where = [index for index in where if index < len(losses)]
    for index in where:
        (losses if of_the_loss else norms)[index] = 100.0 if of_the_loss else 4.1 * 0.8
    assert monitor.count_spikes(losses, norms) == len(where)
    assert Monitor(settings_of(), list(lines_of())[: WINDOW - 1]).count_spikes(losses, norms) == 0


def test_lines_of_a_run_hold_what_the_model_says_of_its_plans(tiny_settings, monkeypatch):  # noqa: F811
    kept, original = [], training_step.training_forward

    def forward(model, batch, num_tokens, weights):
        hook = model.encoder.register_forward_hook(lambda module, inputs, logits: kept.append(logits.detach()))
        losses = original(model, batch, num_tokens, weights)
        hook.remove()
        assert num_tokens == int(predicted_tokens(batch["labels"]))
        return losses

    monkeypatch.setattr(training_step, "training_forward", forward)
    run = train(tiny_settings(model={"plan_span": "sequence", "readout_init_scale": 3.0}), quiet=True)
    for line, logits in zip(run.read_metrics(), kept, strict=False):
        per_bit = kl_bits_per_bit(logits)
        kl = per_bit.sum(-1)
        assert line["kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
        assert line["kl_hinge"] == pytest.approx(float((kl - 0.25).clamp(min=0).mean()), abs=1e-5)
        assert line["live_bits"] == int((per_bit.flatten(0, 1).mean(0) > 0.05).sum())
        assert line["loss"] - line["reconstruction"] == pytest.approx(line["kl_hinge"] * math.log(2) / 15, abs=1e-5)


def test_what_needs_doing_is_in_the_lines_once_also_after_a_stop(tiny_settings, monkeypatch, capsys):  # noqa: F811
    sections = {"training": {"max_steps": 8, "save_every": 1, "eval_every": 2, "learning_rate": 1e-6}}
    sections["model"] = {"free_bits": 20.0}
    whole = train(tiny_settings("whole", **sections))
    written = " ".join(capsys.readouterr().err.split())
    assert written.count("KL: far below the 20 free bits") == 1
    advised = [line for line in whole.read_metrics() if "advice" in line]
    assert advised and "free_bits" in advised[0]["advice"]
    with monkeypatch.context() as patch:
        stop_before_step(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings("stopped", **sections), quiet=True)
    assert untimed(train(tiny_settings("stopped", **sections), quiet=True).path) == untimed(whole.path)


def test_tensorboard_wandb_and_trackio_get_the_same_numbers(tiny_settings, monkeypatch, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    logging = {"tensorboard": True, "wandb": True, "trackio": True, "project": "tiny"}
    run = train(tiny_settings(logging=logging, training={"max_steps": 3, "eval_every": 3}), quiet=True)
    lines = run.read_metrics()
    expected = {line["step"]: line["reconstruction"] for line in lines if line["split"] == "train"}

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/reconstruction")}
    assert found == pytest.approx(expected)

    with sqlite3.connect(next((tmp_path / "trackio").glob("tiny*.db"))) as database:
        rows = [(step, json.loads(values)) for step, values in database.execute("select step, metrics from metrics")]
    found = {step: values["train/reconstruction"] for step, values in rows if "train/reconstruction" in values}
    assert found == pytest.approx(expected)

    assert list((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert (run.path / "wandb_id.txt").read_text().strip()


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_written(tiny_settings, monkeypatch):  # noqa: F811
    monkeypatch.setattr("free_transformer.runs.trackers.importlib.util.find_spec", lambda name: None)
    settings = tiny_settings(logging={"wandb": True})
    with pytest.raises(SettingsError, match=r"wandb is not installed; pip install 'free-transformer-lm\[wandb\]'"):
        train(settings, quiet=True)
    assert not settings.run_dir.exists()


def test_watch_draws_curves_and_every_figure(tiny_settings, capsys):  # noqa: F811
    run = train(tiny_settings(training={"eval_every": 2}), quiet=True)
    watch([run.path], once=True)
    shown = capsys.readouterr().out
    assert all(label in shown for label in FREE)
    assert "step 6 ended" in shown and "nats per token" in shown
    watch([run.path])  # of a run that has ended, it returns by itself
    with pytest.raises(SettingsError, match="not a run"):
        watch([run.path.parent / "nothing"], once=True)


@pytest.mark.parametrize(("width", "height", "rows"), [(120, 50, 2), (80, 24, 1), (60, 24, 1), (80, 12, 0)])
def test_watch_fits_the_terminal_and_keeps_every_figure(width, height, rows, tmp_path):
    run = Run(tmp_path)
    run.write_config(settings_of())
    for line in lines_of(kl_hinge=9.0):  # too much: one alarm
        run.append_metrics(**line)
        run.append_metrics(step=line["step"], split="validation", loss=2.0 - line["step"] / 1000, gap=0.1)
    console = Console(width=width, height=height, file=io.StringIO())
    console.print(_fitting([run], console))
    drawn = console.file.getvalue().splitlines()
    assert len(drawn) < height
    assert sum("┌" in text for text in drawn) == rows
    assert all(any(label in text for text in drawn) for label in FREE)
    assert "model.free_bits" in "".join(drawn)


def test_runs_of_one_name_in_two_folders_are_told_apart(tiny_settings, capsys):  # noqa: F811
    runs = [
        train(tiny_settings(f"{folder}/same", training={"max_steps": steps}), quiet=True)
        for folder, steps in (("one", 2), ("other", 3))
    ]
    watch([run.path for run in runs], once=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "step 2 ended" in shown and "step 3 ended" in shown


def test_a_report_is_of_any_run_also_while_it_trains(tiny_settings, monkeypatch, outside_references):  # noqa: F811
    settings = tiny_settings(training={"save_every": 2})
    with monkeypatch.context() as patch:
        stop_before_step(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(settings, quiet=True)
    page = write_run_report(settings.run_dir).read_text()
    assert "step 5 of 6, interrupted" in page and "<svg" in page
    assert not outside_references(page)
    empty = tiny_settings("empty")
    empty.run_dir.mkdir()
    (empty.run_dir / "config.yaml").write_text(empty.to_yaml())
    assert "No step has been logged yet" in write_run_report(empty.run_dir).read_text()


def test_a_report_of_several_runs_overlays_them(tiny_settings, tmp_path, outside_references):  # noqa: F811
    runs = [train(tiny_settings(name, model={"kind": name}), quiet=True) for name in ("free", "baseline")]
    path = write_run_report(*(run.path for run in runs))
    assert path == tmp_path / "report.html"
    page = path.read_text()
    assert page.count("<svg") == 4 and "Held-out" not in page  # only training metrics, one figure each
    assert page.index(">free</span>") < page.index(">baseline</span>")  # the legend
    assert "A baseline, which has no plan." in page and "model.kind" in page and "training.max_steps" not in page
    assert not outside_references(page)
    assert write_run_report(runs[0].path, out=tmp_path / "own.html").is_file()


EXAMPLES = {
    "prompt": "the",
    "temperature": 0.7,
    "texts": [{"plan": plan, "share": share, "text": f"the {plan} <i>"} for plan, share in (("01", 0.4), ("10", None))],
    "live": [0],
    "bits": [
        {"bit": 0, "spent": 0.9, "effect": 0.2, "standard_error": None, "text": "the 01 <b>changed"},
        {"bit": 1, "spent": 0.0, "effect": 0.0, "standard_error": 0.1, "text": "the 01 <i>"},
    ],
    "sources": {"labels": ["<u>"], "plans": ["0·", "1·"], "shares": [[0.25, 0.75]], "texts": [8]},
}
COMPARISON = {"nll": 1.5, "baseline_nll": 1.4, "difference": 0.1, "standard_error": 0.02, "elbo_difference": 0.2}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """An ended run without a model: what a report reads of it."""
    run = Run(tmp_path_factory.mktemp("ended") / "run")
    run.write_config(settings_of())
    for line in lines_of(kl=0.1):
        run.append_metrics(**line)
    write_text(run.model_folder / "config.json", "{}")
    update_marker(run.path, model={"id": "a", "step": 490}, ended=True)
    return run


def test_a_report_without_results_says_which_command_adds_them(ended):
    page = write_run_report(ended.path).read_text()
    assert f"free-transformer evaluate {ended.path}" in page
    assert "One prompt under" not in page and "Difference from the baseline" not in page
    assert "first seen at step 400, still active" in page  # the alarm of the KL


def test_a_report_shows_what_was_measured_and_texts_stay_text(ended, outside_references):
    model = {"model": {"id": "a"}}
    write_json(ended.examples_file, {**EXAMPLES, **model})
    write_json(ended.comparison_file, {**COMPARISON, "baseline": "<s>", **model})
    page = write_run_report(ended.path).read_text()
    headings = ["Warnings", "One prompt under four plans", "Plans by source", "What each bit changes"]
    headings += ["Difference from the baseline", "Curves", "Settings"]
    places = [page.index(f"<h2>{heading}</h2>") for heading in headings]
    assert places == sorted(places) and page.index("class='verdict") < places[0]
    assert "<mark>&lt;b&gt;changed</mark>" in page and "as 40% of held-out texts" in page
    assert "75%" in page and "bit 0: 0.2000 nats per token" in page and "1 bit that is not live" in page
    assert "+0.1000 ± 0.0392 nats per token (95 % interval): the plan costs likelihood" in page
    assert not any(tag in page for tag in ("<i>", "<u>", "<s>", "<script"))
    assert "<meta name=viewport" in page and not outside_references(page)
    write_json(ended.examples_file, {**EXAMPLES, "model": {"id": "earlier"}})
    assert "measured on an earlier model" in write_run_report(ended.path).read_text()


def test_figures_take_the_colors_of_the_page_and_start_at_zero_where_noise_would_look_like_a_signal(ended):
    page = write_run_report(ended.path).read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert drawings.count('role="img"') == drawings.count("<svg") >= 4
    assert set(re.findall(r": (#[0-9a-f]{6})", drawings)) <= {"#ffffff"}  # all others follow a dark page
    by_title = {figure.axes[0].get_title(loc="left"): figure.axes[0] for figure in curves({"run": list(lines_of())})}
    for title in ("KL", "Live bits", "Gradient norm"):
        assert by_title[title].get_ylim()[0] == 0
    assert by_title["Reconstruction"].get_ylim()[0] > 0
    flat = curves({"run": list(lines_of(count=30, reconstruction=2.0, loss=2.0))[-10:]})[0].axes[0].get_ylim()
    assert flat[1] - flat[0] >= 0.1  # 5 % of 2 nats


def test_losses_that_may_not_be_compared_are_in_different_figures():
    baseline = [{key: value for key, value in line.items() if "kl" not in key} for line in lines_of()]
    figures = curves({"free": list(lines_of()), "baseline": baseline})
    drawn = {figure.axes[0].get_title(loc="left"): len(figure.axes[0].lines) for figure in figures}
    assert drawn["Reconstruction"] == 1 and drawn["Gradient norm"] == 3  # with the line at zero
    alone = [figure.axes[0].get_title(loc="left") for figure in curves({"baseline": baseline})]
    assert "Training loss" in alone and "Reconstruction" not in alone


class Recorder(Subscriber):
    """Keeps the names of everything that is published, in order."""

    def __init__(self):
        self.published = []
        self.lines = []

    def start(self, start):
        self.published.append("start")
        self.run_start = start

    def metrics(self, update):
        self.published.append(update.split)
        self.lines.append(dict(update.line))

    def message(self, text, level="info"):
        self.published.append(text.partition(":")[0])

    def sample(self, step, text):
        self.published.append("sample")

    def close(self):
        self.published.append("close")


def test_subscribers_receive_the_run_in_order_and_the_lines_of_the_file(tiny_settings, monkeypatch):  # noqa: F811
    recorder, subscribers = Recorder(), PreparedRun.subscribers
    monkeypatch.setattr(PreparedRun, "subscribers", lambda self, quiet: [recorder, *subscribers(self, quiet)])
    settings = tiny_settings(training={"max_steps": 2, "eval_every": 2}, logging={"sample_every": 2})
    run = train(settings, quiet=True)
    assert recorder.published == ["start", "train", "train", "validation", "sample", "close", "trained"]
    assert recorder.lines == run.read_metrics()
    assert (recorder.run_start.name, recorder.run_start.step, recorder.run_start.max_steps) == ("run", 0, 2)


def test_a_failed_run_closes_its_subscribers(tiny_settings, monkeypatch):  # noqa: F811
    recorder = Recorder()
    monkeypatch.setattr(PreparedRun, "subscribers", lambda self, quiet: [recorder])
    stop_before_step(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_settings(), quiet=True)
    assert recorder.published[-1] == "close"


def test_monitor_publishes_an_alarm_once_and_its_end():
    recorder = Recorder()
    monitor = Monitor(settings_of(), lines_of(), [recorder])
    *_, line = lines_of(start=500)
    norms = [0.8, *[90.0] * 9, *[0.8] * 10]
    for step, norm in enumerate(norms, start=800):
        monitor.record(step, "train", {**line, "step": step, "grad_norm": norm})
    advised = [line["advice"] for line in recorder.lines if "advice" in line]
    assert len(advised) == 2 and advised[0].startswith("gradient norm: over 10 times") and advised[1] == "all is well"


def test_open_refuses_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(SettingsError, match="not a run"):
        Run.open(tmp_path)
    Run(tmp_path).write_config(settings_of())
    assert Run.open(tmp_path).settings.model.free_bits == 2.0
