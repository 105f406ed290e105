"""Annealing and the monitor: results for a step, and the reaction of a run."""

import pytest
import torch
from test_likelihood import result
from test_training import tiny_settings  # noqa: F401

from free_transformer import FreeTransformer
from free_transformer.evaluation.usage import PlanUsage, collapse_warning
from free_transformer.model.losses import LossWeights, objective, predicted_tokens, reconstruction_loss
from free_transformer.runs.report import write_run_report
from free_transformer.settings import Settings, SettingsError
from free_transformer.settings.curriculum import annealed, scheduled_weights
from free_transformer.training import state as build
from free_transformer.training import step, train
from processes import untimed


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        ("cosine", [0.2, 0.2 + 0.8 * 0.14644661, 0.6, 0.2 + 0.8 * 0.85355339, 1.0, 1.0]),
    ],
)
def test_schedules_go_from_start_to_end(schedule, expected):
    values = [annealed(schedule, 0.2, 1.0, step, 8, 4) for step in (0, 2, 4, 6, 8, 100)]
    assert values == pytest.approx(expected)


def test_schedules_go_down_too():
    assert [annealed("linear", 4.0, 1.0, step, 3, 1) for step in range(5)] == pytest.approx([4, 3, 2, 1, 1])


def test_a_cycle_rises_for_half_of_it_and_stays_for_the_other():
    values = [annealed("cyclical", 0.0, 1.0, step, 16, 2) for step in range(17)]
    cycle = [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert values == pytest.approx([*cycle, *cycle, 1])


def test_weights_of_a_step_follow_both_schedules():
    curriculum = {"kl_schedule": "linear", "free_bits_schedule": "linear", "free_bits_start": 3.0}
    sections = {"training": {"max_steps": 8, "kl_weight": 0.5}, "curriculum": curriculum, "model": {"free_bits": 1.0}}
    settings = Settings.model_validate(sections)
    assert scheduled_weights(settings, 0) == {"kl_weight": 0.0, "free_bits": 3.0}
    assert scheduled_weights(settings, 2) == {"kl_weight": 0.25, "free_bits": 2.0}  # half of the steps: 4
    assert scheduled_weights(settings, 7) == {"kl_weight": 0.5, "free_bits": 1.0}
    settings.curriculum.anneal_steps = 2
    assert scheduled_weights(settings, 2) == {"kl_weight": 0.5, "free_bits": 1.0}


def test_forward_takes_the_weights_of_a_step(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span=1, free_bits=0.5), tokens_like(2, 8)
    torch.manual_seed(0)
    of_step = LossWeights(kl_weight=torch.tensor(0.25), free_bits=torch.tensor(0.1))
    output = model(tokens, labels=tokens, mode="training", loss_weights=of_step)
    total, count = reconstruction_loss(output.logits, tokens), predicted_tokens(tokens)
    weights = LossWeights(free_bits=0.1, kl_weight=0.25)
    expected = objective(total, count, output.plan_logits, output.plan_mask, weights)
    torch.testing.assert_close(output.loss, expected.loss)


def test_training_gives_each_step_its_weights_and_a_resumed_run_continues(tiny_settings, monkeypatch):  # noqa: F811
    seen = []
    original = step.training_forward

    def watch(model, batch, tokens, weights):
        seen.append({name: float(value) for name, value in weights.items()})
        return original(model, batch, tokens, weights)

    monkeypatch.setattr(step, "training_forward", watch)
    schedule = {"kl_schedule": "linear", "anneal_steps": 4, "prior_rows": 0}
    train(tiny_settings(training={**schedule, "max_steps": 3}), quiet=True)
    train(tiny_settings(training={**schedule, "max_steps": 6}), quiet=True)
    assert [each["kl_weight"] for each in seen] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert all(each["free_bits"] == 0.25 for each in seen)


def test_free_bits_cannot_start_below_what_a_plan_must_spend(tiny_settings):  # noqa: F811
    with pytest.raises(SettingsError, match=r"curriculum.free_bits_start=0.0: must be at least model.min_bits=0.2"):
        tiny_settings(model={"min_bits": 0.2, "free_bits": 1.0}, training={"free_bits_schedule": "linear"})


def usage(bits: list[float], information: float | None = None) -> PlanUsage:
    tells = sum(bits) if information is None else information
    return PlanUsage(bits_used=sum(bits), bits_per_position=bits, live_bits=0, share_at_floor=1.0, information=tells)


def test_the_watcher_names_each_sign_of_collapse():
    sound = result(usage=usage([0.9, 0.9]))
    assert collapse_warning(sound, free_bits=2.0) is None
    assert "not used" in collapse_warning(result(usage=usage([0.9, 0.9]), gap=0.0), free_bits=2.0)
    dying = collapse_warning(result(usage=usage([0.04, 0.04])), free_bits=2.0)
    assert "uses 0.080 of its 2 free bits and no bit of the plan is live" in dying
    assert "Try" not in dying  # what to change depends on the settings of the run
    assert collapse_warning(result(usage=usage([0.04, 0.04])), free_bits=0.1) is None  # few bits, and it spends them
    assert "no bit of the plan is live" in collapse_warning(result(usage=usage([0.01, 0.01])), free_bits=0.0)
    assert collapse_warning(result(gap=None, usage=None), free_bits=1.0) is None
    constant = collapse_warning(result(usage=usage([0.9, 0.9], information=0.17)), free_bits=2.0)
    assert "the plan carries no information: all texts have the same plan; only 0.170 of its 1.80 bits" in constant
    assert collapse_warning(result(usage=usage([0.9, 0.9], information=0.19)), free_bits=2.0) is None
    alone = result(usage=usage([0.9, 0.9], information=0.0), documents=1, standard_errors={"gap": float("nan")})
    assert collapse_warning(alone, free_bits=2.0) is None  # undefined for a single text


@pytest.mark.parametrize("validation", [True, False])
def test_a_run_that_collapses_says_so(tiny_settings, monkeypatch, capsys, validation):  # noqa: F811
    class Ignored(FreeTransformer):
        def __init__(self, config):
            super().__init__(config)
            torch.nn.init.zeros_(self.plan_table.weight)
            self.plan_table.weight.requires_grad_(False)

    monkeypatch.setattr(build, "FreeTransformer", Ignored)
    data = {} if validation else {"data": {**tiny_settings().data.model_dump(), "validation": []}}
    run = train(tiny_settings(training={"eval_every": 2}, **data))
    watched = [line for line in untimed(run.path) if line["split"] == "watcher"]
    assert [line["step"] for line in watched] == [4, 6]  # not during the warm-up of two steps
    assert all(line["collapsed"] and "the plan is not used" in line["warning"] for line in watched)
    written = " ".join(capsys.readouterr().err.split())
    assert written.count("collapsed: the plan is not used") == 1  # once, while it lasts
    write_run_report(run.path)
    assert "collapsed: the plan is not used" in run.report_file.read_text()


def test_a_baseline_is_not_watched(tiny_settings):  # noqa: F811
    run = train(tiny_settings(model={"kind": "baseline"}, training={"eval_every": 2}), quiet=True)
    assert not [line for line in run.read_metrics() if line["split"] == "watcher"]


@pytest.mark.parametrize("streaming", [True, False])
def test_the_aggregate_prior_is_gathered_at_the_end(tiny_settings, streaming):  # noqa: F811
    data = {**tiny_settings().data.model_dump(), "streaming": streaming}
    run = train(tiny_settings("gathered", training={"prior_rows": 9}, data=data), quiet=True)
    assert run.load_model().plan_prior.gathered
    without = train(tiny_settings("without", training={"prior_rows": 0}, data=data), quiet=True)
    assert not without.load_model().plan_prior.gathered
