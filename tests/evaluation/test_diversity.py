"""Diversity, coherence and quality, by hand and against the model's own loss."""

import numpy as np
import pytest
import torch

from free_transformer import build_baseline
from free_transformer.data import load_tokenizer
from free_transformer.evaluation.diversity import (
    distinct_n,
    halves_agree,
    label_entropy,
    measure_diversity,
    reference_nll,
    self_bleu,
)


def classify(texts) -> np.ndarray:
    return np.array([text.count("a") > text.count("b") for text in texts]).astype(int)


def test_distinct_counts_different_pairs_of_words():
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab ba ab, ab
    assert distinct_n(["a b c"], 1) == 1
    assert np.isnan(distinct_n(["a"], 2))


def test_self_bleu_of_equal_texts_is_full_and_of_different_ones_nothing():
    assert self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(100)
    assert self_bleu(["the cat sat down", "one two three four"]) < 20


def test_self_bleu_takes_texts_evenly():
    assert self_bleu(["x y z w", "p q r s"] * 4, most=4) == pytest.approx(100)  # every other one: the first


def test_label_entropy_is_in_bits():
    assert label_entropy(np.array([0, 1, 2, 3])) == pytest.approx(2)
    assert label_entropy(np.array([2, 2])) == 0


def test_halves_are_classified_separately():
    assert halves_agree(["aabb", "aaaa", "bbbb"], classify).tolist() == [False, True, True]


def test_quality_is_the_loss_of_the_reference(tiny_config):
    tokenizer = load_tokenizer("bytes")
    reference = build_baseline(tiny_config(vocab_size=len(tokenizer))).eval()
    texts = ["one cat", "a longer text of more bytes", "x"]
    expected = []
    for text in texts:
        tokens = torch.tensor([[tokenizer.bos_token_id, *text.encode()]])
        with torch.no_grad():
            expected.append(float(reference(tokens, labels=tokens).loss))
    assert reference_nll(reference, tokenizer, texts, batch_size=2) == pytest.approx(expected, abs=1e-5)


def test_everything_at_once_has_errors_that_shrink_with_the_texts(tiny_config):
    tokenizer = load_tokenizer("bytes")
    reference = build_baseline(tiny_config(vocab_size=len(tokenizer))).eval()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdef"), 8)) for _ in range(400)]
    value = measure_diversity(texts, classify, reference, tokenizer)
    few = measure_diversity(texts[:40], classify)
    assert few.quality is None and few.coherence[1] > value.coherence[1] > 0
    assert 0 < value.distinct[0] < 1 and value.self_bleu is not None
    assert value.label_entropy[0] == pytest.approx(label_entropy(classify(texts)), abs=0.05)
    assert value.coherence[0] == halves_agree(texts, classify).mean()


def test_too_few_texts_are_refused():
    with pytest.raises(ValueError, match="19 texts: at least 20 are needed for 10 parts"):
        measure_diversity(["a"] * 19, classify)
