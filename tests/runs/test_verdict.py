"""The verdict on a run, from the files in its folder."""

import json

import pytest
from test_watching import lines_of

from free_transformer.files import update_marker, write_json, write_text
from free_transformer.runs.diagnostics import plan_advice
from free_transformer.runs.monitor import alarm_periods
from free_transformer.runs.run import Run
from free_transformer.runs.verdict import cost_sentence, verdict_of
from free_transformer.settings import parse_settings

USAGE = {"live_bits": 2, "bits_per_position": [0.9, 0.01, 0.8, 0.0], "information": 1.72}
EVALUATION = {"nll": 1.5, "gap": 0.05, "documents": 20, "warning": None, "usage": USAGE}
COMPARISON = {"nll": 1.5, "baseline_nll": 1.504, "difference": -0.004, "standard_error": 0.001}
UNUSED = {"split": "watcher", "collapsed": True, "warning": "the plan is not used: a random plan predicts as well"}
VALIDATION = {"step": 480, "split": "validation", "loss": 2.0, "gap": 0.031}


def run_of(folder, lines=(), ended=False, evaluation=None, comparison=None, **sections) -> Run:
    """A run of 1,000 steps with a warm-up of 10; results, if given, are of its model."""
    run = Run(folder)
    model = {"latent_dim": 4, **sections.pop("model", {})}
    training = {"max_steps": 1000, "warmup_steps": 10, **sections.pop("training", {})}
    data = {"validation": ["held_out.txt"]}
    run.write_config(parse_settings({"model": model, "training": training, "data": data, **sections}))
    for line in lines:
        run.append_metrics(**line)
    if ended:
        write_text(run.model_folder / "config.json", "{}")
    update_marker(folder, model={"id": "a", "step": 1000}, ended=ended)
    for file, results in ((run.evaluation_file, evaluation), (run.comparison_file, comparison)):
        if results is not None:
            write_json(file, {"model": {"id": "a"}, **results})
    return run


def test_a_run_that_was_compared_has_its_bits_and_its_cost_with_the_interval(tmp_path):
    verdict = verdict_of(run_of(tmp_path, lines_of(), True, EVALUATION, COMPARISON))
    assert verdict.sentences == (
        "The plan is used: 2 of 4 bits are live and distinguish texts by up to 1.7 bits.",
        "Cost against the baseline: -0.0040 ± 0.0020 nats per token (95 % interval): the likelihood is better than the "
        "baseline's.",
    )
    assert (verdict.tone, verdict.command) == ("good", f"free-transformer plan {tmp_path}")
    assert verdict.lines == [" ".join(verdict.sentences), f"Next: see what each bit changes: {verdict.command}"]


@pytest.mark.parametrize(
    ("difference", "error", "meaning"),
    [
        (-0.004, 0.001, "the likelihood is better"),
        (0.004, 0.001, "the plan costs likelihood"),
        (0.001, 0.001, "no significant difference"),
        (0.001, None, "on a single text"),
    ],
)
def test_a_difference_within_its_interval_is_none(difference, error, meaning):
    sentence = cost_sentence({"difference": difference, "standard_error": error})
    assert f"{difference:+.4f}" in sentence and meaning in sentence


@pytest.mark.parametrize(
    ("changes", "words", "used"),
    [
        ({}, "1 of 1 bits is live and distinguishes texts by up to 0.5 bits", True),
        ({"documents": 1}, "1 of 1 bits is live.", True),
        ({"usage": {**USAGE, "live_bits": 0}}, "a text's own plan saves 0.0500 nats per token", True),
        (
            {"warning": "the plan carries no information: all texts have the same plan"},
            "The plan carries no inf",
            False,
        ),
    ],
)
def test_usage_is_what_was_measured(tmp_path, changes, words, used):
    one = {"usage": {"live_bits": 1, "bits_per_position": [0.5], "information": 0.5}}
    verdict = verdict_of(run_of(tmp_path, lines_of(), True, {**EVALUATION, **one, **changes}))
    assert words in verdict.sentences[0] and (verdict.tone == "good") == used
    assert ("compare" in str(verdict.command)) == used and ("train longer" in str(verdict.next_step)) != used


@pytest.mark.parametrize(
    ("warmup", "step", "sentence"),
    [
        (10, 290, "No bit is used yet: normal up to step 300."),
        (400, 390, "No bit is used yet: normal up to step 400."),
    ],
)
def test_a_plan_that_is_not_used_early_is_normal(tmp_path, warmup, step, sentence):
    lines = lines_of(count=3, start=step - 20, live_bits=0, kl=0.0)
    verdict = verdict_of(run_of(tmp_path, lines, training={"warmup_steps": warmup}))
    assert verdict.sentences == (sentence,) and verdict.tone == "open"
    assert "resume" in str(verdict.next_step)  # no process trains in this folder


def test_a_plan_that_is_not_used_later_is_a_problem_whose_remedy_depends_on_progress(tmp_path):
    lines = [*lines_of(live_bits=0, kl=0.0), {**VALIDATION, "gap": 0.0}, {"step": 490, **UNUSED}]
    adamw = {"optimizer": {"name": "adamw"}}
    verdict = verdict_of(run_of(tmp_path / "running", lines, **adamw))
    assert verdict.tone == "problem" and verdict.sentences[0].startswith("At step 490 the plan is not used")
    assert str(verdict.next_step).startswith("if the next validation shows the same")
    ended = verdict_of(run_of(tmp_path / "ended", lines, ended=True, **adamw))
    assert ended.next_step == "train again with other settings: use optimizer.name=muon."
    all_set = verdict_of(run_of(tmp_path / "all", lines, ended=True)), verdict_of(run_of(tmp_path / "on", lines))
    assert [str(each.next_step).partition(",")[0] for each in all_set] == ["train longer", "train on"]
    only_bits = verdict_of(run_of(tmp_path / "bits", lines[:-2]))
    assert only_bits.sentences == ("The plan is not used: no of 4 bits is live at step 490, and its KL is 0.00 bits "
                                   "per plan.",)  # fmt: skip


@pytest.mark.parametrize(
    ("watched", "words", "tone"), [(True, "saves 0.0310 nats", "good"), (False, "not yet known", "open")]
)
def test_while_it_trains_the_plan_is_used_once_the_watcher_has_seen_it(tmp_path, watched, words, tone):
    watcher = [VALIDATION, {**UNUSED, "step": 480, "collapsed": False}] if watched else []
    verdict = verdict_of(run_of(tmp_path, [*lines_of(), *watcher]))
    assert words in verdict.sentences[0] and "6 of 4 bits are live" in verdict.sentences[0] and verdict.tone == tone


def test_results_of_an_earlier_model_are_no_verdict(tmp_path):
    run = run_of(tmp_path, lines_of(), True, EVALUATION, {**COMPARISON, "model": {"id": "earlier"}})
    assert len(verdict_of(run).sentences) == 1
    update_marker(tmp_path, model={"id": "b"})
    assert "not yet known" in verdict_of(run).sentences[0]


def test_runs_without_a_line_and_baselines_have_a_verdict(tmp_path):
    assert verdict_of(run_of(tmp_path / "new")).sentences == ("No step has been logged yet.",)
    baseline = verdict_of(run_of(tmp_path / "b", lines_of(), True, {"nll": 1.5}, model={"kind": "baseline"}))
    assert baseline.sentences == ("A baseline, which has no plan. Its NLL is 1.5000 nats per token.",)
    assert baseline.command == f"free-transformer compare RUN {tmp_path / 'b'}"


def test_a_cost_of_many_plans_asks_for_the_tighter_bound(tmp_path):
    costly = {**COMPARISON, "difference": 0.01, "method": "importance"}
    run = run_of(tmp_path, lines_of(), True, EVALUATION, costly, model={"plan_span": 1})
    assert str(verdict_of(run).command).endswith("--method particle_filter")
    write_json(run.comparison_file, json.loads(run.comparison_file.read_text()) | {"method": "particle_filter"})
    assert "particle_filter" not in str(verdict_of(run).command)


@pytest.mark.parametrize(
    ("model", "optimizer", "advised"),
    [
        ({}, "auto", []),
        ({"free_bits": 0.5, "min_bits": 0.4}, "muon", ["raise model.free_bits to 1 or 2 bits"]),
        ({"min_bits": 0.0}, "adamw", ["set model.min_bits slightly below model.free_bits", "use optimizer.name=muon"]),
        ({"aggregate_weight": 0.0}, "muon", ["set model.aggregate_weight=1"]),
        ({"plan_span": 1}, "muon", ["let each plan cover more tokens (model.plan_span)"]),
        ({"plan_span": 8, "free_bits": 0.1}, "muon", ["raise model.free_bits to 0.5 bits", "let each plan cover more "
                                                      "tokens (model.plan_span)"]),
        ({"table_init": "normal"}, "muon", ["use model.table_init=bit_linear"]),
    ],
)  # fmt: skip
def test_advice_is_what_is_not_set_and_what_the_documentation_found_to_help(model, optimizer, advised):
    """docs/plan.md: min_bits fills many plans per text with noise, and 1 bit per token breaks generation."""
    advice = plan_advice(parse_settings({"model": model, "optimizer": {"name": optimizer}}))
    assert advice == (
        ", ".join(advised) or "all settings that help are already in use; train longer, or check the training text"
    )


def test_few_free_bits_cannot_make_a_bit_live_and_schedules_count(tmp_path):
    model = {"plan_span": 1, "free_bits": 0.1}
    quiet = run_of(tmp_path / "few", lines_of(live_bits=0, kl=0.09), model=model)
    assert alarm_periods(quiet.settings, quiet.read_metrics()) == []
    rising = {"free_bits_schedule": "linear", "free_bits_start": 0.0, "anneal_steps": 10_000}
    slow = run_of(tmp_path / "slow", lines_of(kl=0.06), model={"min_bits": 0.0}, curriculum=rising)
    assert alarm_periods(slow.settings, slow.read_metrics()) == []  # 0.12 of 2.5 bits are free at step 490


def test_alarms_have_their_first_and_last_step():
    settings = parse_settings({"training": {"max_steps": 1000, "warmup_steps": 10}})
    lines = [*lines_of(kl=0.1), *lines_of(count=5, start=500, reconstruction=2.0)]
    (period,) = alarm_periods(settings, lines)
    assert (period.label, period.first, period.last, period.is_over) == ("KL", 400, 490, True)
    (period,) = alarm_periods(settings, lines[:25])
    assert (period.first, period.last, period.is_over) == (400, 440, False)
