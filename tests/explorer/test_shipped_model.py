"""The small model of the repository: its figures hold, its plans are the styles, and it is small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from free_transformer.evaluation import evaluate_likelihood
from free_transformer.explorer.survey import PlanSurvey
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.plan_text import format_bits
from free_transformer.runs.load_model import load_pretrained

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "three-styles"
EXAMPLES = ROOT / "examples" / "three_styles"
ROWS = 6


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Rows of each style that no training saw, and their styles."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from demo import read_rows
        from styles import STYLES, write_corpus
    finally:
        sys.path.remove(str(EXAMPLES))
    from free_transformer.data import load_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    found = read_rows(folder / "validation.jsonl", load_tokenizer(str(FOLDER)), 256)
    places = np.concatenate(
        [np.flatnonzero(found.styles == style)[:: max(1, 200 // ROWS)][:ROWS] for style in range(3)]
    )
    return torch.from_numpy(found.rows.tokens[places]).long(), [STYLES[style] for style in found.styles[places]]


@pytest.fixture(scope="module")
def model():
    return FreeTransformer.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_plans_of_held_out_text_tell_its_style(model, held_out):
    tokens, styles = held_out
    survey = PlanSurvey.load(FOLDER, model.config.latent_dim)
    plans = [format_bits(plan) for plan in model.infer_plan(tokens) > 0]
    known = [(survey.counts[plan], style) for plan, style in zip(plans, styles, strict=True) if plan in survey.counts]
    assert len(known) > 0.8 * len(styles)
    right = [max(counts, key=counts.get) == style for counts, style in known]
    assert np.mean(right) >= 0.95
    assert set(model.config.plan_names) == set(styles)


def test_the_likelihood_is_the_one_that_its_card_states(model, held_out):
    figures = json.loads((FOLDER / "figures.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert f"{figures['nll']:.4f}" in card and f"{figures['baseline']:.4f}" in card
    baseline = load_pretrained(FOLDER / "baseline", dtype=torch.float32)
    batches = [{"input_ids": part} for part in held_out[0].split(18)]
    torch.manual_seed(0)
    found = [evaluate_likelihood(each, batches, num_samples=8).nll for each in (model, baseline)]
    # other rows than those of the card, a few of each style, on which both models are compared
    assert found[1] == pytest.approx(figures["baseline"], abs=0.15)
    assert found[0] - found[1] == pytest.approx(figures["nll"] - figures["baseline"], abs=0.03)


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 5e6
