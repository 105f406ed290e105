"""The letters experiment: what is measured of strings, and the command from training to report."""

import sys

import numpy as np
import pytest

from free_transformer.cli.main import main
from free_transformer.data.letters import LENGTH, NOISE, PLACES, letters
from free_transformer.reproduce import letters as experiment
from free_transformer.reproduce import letters_report
from free_transformer.reproduce.letters import VARIANTS, Variant, batches_of, build_variant, read_result
from free_transformer.reproduce.noise import noise_optimum
from free_transformer.reproduce.strings import measure_groups, places_and_validity, prompts


def bytes_of(*strings: str) -> np.ndarray:
    return np.array([list(string.ljust(LENGTH, "_").encode()) for string in strings])


A = np.array([ord("A")])


@pytest.mark.parametrize(
    ("string", "place", "valid"),
    [
        ("___AAAAAAAA", 3, True),
        ("___A!AAAA!A_!!", 3, True),
        ("___!AAAAAA!", 3, True),
        ("!!AAAAAA!!", 1, True),  # 0, 1 or 2: the middle one
        ("___AAAAAAA", 2.5, False),  # seven letters
        ("___AAAAAAAAA", 3.5, False),  # nine
        ("___AAAABAAA", 3, False),
        ("___AAAAAAAA____B", 3, False),
        ("", np.nan, False),
    ],
)
def test_place_and_validity_of_a_string(string, place, valid):
    places, valids = places_and_validity(bytes_of(string), A)
    np.testing.assert_equal(places, [place])
    assert valids.tolist() == [valid]


def test_every_string_of_the_task_is_valid_and_their_places_are_spread():
    text = list(letters(2000, seed=3))
    strings = np.array([list(string[2:].encode()) for string in text])
    groups = measure_groups(strings, np.array([ord(string[0]) for string in text]), 20)
    assert groups.valid == 1
    assert groups.noise_rate == pytest.approx(NOISE, abs=0.003)
    assert groups.place_std == pytest.approx(((PLACES**2 - 1) / 12) ** 0.5, abs=0.5)
    assert groups.place_mode < 0.2
    assert groups.noise_overlap == pytest.approx(0.03, abs=0.01)


def test_a_shared_place_and_shared_noise_show():
    group = bytes_of("__AAAAAAAA__!", "__AAAAAAAA__!", "__AAAAAAAA___", "_AAAAAAAA___!!")
    groups = measure_groups(group, A.repeat(4), 4)
    assert groups.place_std == pytest.approx(0.5)
    assert groups.place_mode == 0.75
    assert groups.noise_overlap == pytest.approx((1 + 0 + 0 + 0.5 + 0.5 + 0) / 6)  # of the six pairs


def test_prompts_have_one_letter_a_group_and_are_the_same_for_a_seed():
    tokens = prompts(3, 4, 256, seed=1)
    assert tokens.shape == (12, 3)
    assert (tokens[:, 0] == 256).all() and (tokens[:, 2] == ord(">")).all()
    assert (tokens.view(3, 4, 3)[:, :, 1] == tokens[::4, 1][:, None]).all()
    assert (tokens == prompts(3, 4, 256, seed=1)).all()


def test_the_prompt_is_not_predicted():
    batch = next(batches_of(0, 2))
    assert (batch["labels"][:, :3] == -100).all()
    assert (batch["labels"][:, 3:] == batch["input_ids"][:, 3:]).all()


def best_on_a_grid(free_bits: float) -> tuple[float, float]:
    """Nats a string saved and rate of `!` with one bit: `a` and `b` are its chances without and with a `!`."""
    a, b = np.meshgrid(np.linspace(1e-9, 1 - 1e-9, 1001), np.linspace(1e-9, 1 - 1e-9, 1001))
    entropy = lambda p: -(p * np.log2(p) + (1 - p) * np.log2(1 - p))  # noqa: E731
    hinge = lambda p: np.maximum(0, 1 - entropy(p) - free_bits)  # noqa: E731
    one = (1 - NOISE) * a + NOISE * b  # chance of the bit
    noise = np.clip([NOISE * (1 - b) / (1 - one), NOISE * b / one], 1e-12, 1 - 1e-12)  # chance of ! given the bit
    rest = (1 - one) * entropy(noise[0]) + one * entropy(noise[1])
    saved = entropy(NOISE) - rest - (1 - NOISE) * hinge(a) - NOISE * hinge(b)
    best = np.unravel_index(saved.argmax(), saved.shape)
    return LENGTH * np.log(2) * saved[best], noise[(slice(None), *best)].mean()


@pytest.mark.parametrize("free_bits", [1 / 64, 1 / 8, 1 / 2])
def test_the_optimum_of_the_noise_is_that_of_a_grid_where_the_plan_has_one_bit(free_bits):
    found = noise_optimum(free_bits, latent_dim=1)
    saved, rate = best_on_a_grid(free_bits)
    assert found.saved == pytest.approx(saved, abs=0.02)
    assert found.rate == pytest.approx(rate, rel=0.02)


def test_without_free_bits_the_noise_is_not_worth_a_plan_and_with_one_it_is_worth_all_of_it():
    nothing, everything = noise_optimum(0.0, latent_dim=2), noise_optimum(1.0, latent_dim=2)
    assert nothing.saved == pytest.approx(0, abs=1e-3)  # the information of a plan never exceeds its KL
    assert everything.saved == pytest.approx(LENGTH * 0.2338, abs=0.05)  # the entropy of the noise, in nats
    assert everything.rate > 3 * NOISE  # which the uniform prior then produces too often
    assert everything.overlap_shared > 0.95


def test_a_variant_changes_the_size_and_the_training_of_its_model():
    config = build_variant(Variant("wide", "wide", {"hidden_dim": 32, "plan_span": 1, "latent_dim": 4})).config
    assert (config.hidden_size, config.latent_dim, config.vocab_size) == (32, 4, 259)
    assert Variant("long", "long", None, {"max_steps": 7}).steps(3) == 7


def run_command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["free-transformer", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


@pytest.mark.slow
def test_the_command_trains_measures_reports_and_resumes(monkeypatch, tmp_path, capsys):
    few = [variant for variant in VARIANTS if variant.name in ("1_8", "sequence", "baseline")]
    defaults = experiment.reproduce_letters.__defaults__
    monkeypatch.setattr(experiment.reproduce_letters, "__defaults__", (*defaults[:-1], few))
    monkeypatch.setattr(letters_report, "VARIANTS", few)
    arguments = ("reproduce", "letters", "--out", tmp_path, "--steps", 2, "--groups", 2, "--processes", 1)
    assert run_command(monkeypatch, *arguments) == 0
    page = (tmp_path / "report.html").read_text()
    for variant in few:
        assert variant.title in page
        assert (tmp_path / "seed0" / variant.name / "model" / "model.safetensors").is_file()
    assert "19.000 nats" in page
    result = read_result(tmp_path / "seed0" / "1_8")
    assert result.steps == 2
    assert result.elbo >= result.reconstruction
    assert result.nll > 50  # two steps teach nothing
    stamp = (tmp_path / "seed0" / "1_8" / "result.json").stat().st_mtime_ns
    assert run_command(monkeypatch, *arguments) == 0
    assert (tmp_path / "seed0" / "1_8" / "result.json").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert run_command(monkeypatch, *arguments[:5], 3, *arguments[6:]) == 2
    assert "was trained for 2 steps, not 3; choose another --out" in capsys.readouterr().err
