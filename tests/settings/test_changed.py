"""Which settings differ from their defaults, and between runs."""

import pytest

from free_transformer.settings import parse_settings
from free_transformer.settings.changed import changed_settings, differing_settings


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({}, []),
        ({"run_dir": "elsewhere"}, []),
        ({"training": {"max_steps": 500}}, ["training.max_steps"]),  # its warm-up follows
        ({"training": {"max_steps": 500, "warmup_steps": 7}}, ["training.max_steps", "training.warmup_steps"]),
        ({"model": {"plan_span": 8}}, ["model.plan_span"]),  # its free bits follow
        ({"model": {"preset": "paper"}}, ["model.preset"]),
        ({"model": {"rope_theta": 5.0, "free_bits": 3}}, ["model.free_bits", "model.rope_theta"]),
        ({"optimizer": {"name": "muon"}}, []),  # what `auto` is
        ({"optimizer": {"name": "adamw"}, "data": {"train": ["a.txt"]}}, ["optimizer.name", "data.train"]),
    ],
)
def test_changed_settings_are_those_that_a_person_chose(sections, changed):
    settings = parse_settings(sections)
    assert [name for name, *_ in changed_settings(settings)] == changed
    reread = parse_settings(settings.model_dump(mode="json"))  # as config.yaml has them, with every default
    assert changed_settings(reread) == changed_settings(settings)


def test_values_are_shown_with_their_defaults():
    settings = parse_settings({"training": {"compile": True, "precision": "bf16"}})
    assert changed_settings(settings) == [("training.precision", "bf16", "fp32"), ("training.compile", "true", "false")]


def test_differing_settings_have_a_value_for_each_run():
    runs = [parse_settings({"run_dir": kind, "model": {"kind": kind}}) for kind in ("free", "baseline")]
    assert differing_settings(runs) == [("model.kind", ["free", "baseline"])]
    assert differing_settings(runs[:1]) == []
