"""Coherence of long texts: labels of segments, and their NLL under another model."""

import numpy as np
import torch
import torch.nn.functional as F

from free_transformer import build_baseline
from free_transformer.data import byte_tokenizer
from free_transformer.evaluation import measure_coherence


def classify(texts):
    return np.array(["abc".index(text[0]) for text in texts])


def tokens_of(*texts):
    return torch.tensor([list(text.encode()) for text in texts])


def test_shares_and_switches_of_known_texts():
    found = measure_coherence(tokens_of("abbbbbcc", "baaabaaa"), byte_tokenizer(), classify, 1)
    assert found.beginning.tolist() == [1, 0]  # segments 2 to 4, whatever the first one is
    assert found.share_at(1)[0] == 0.0
    assert found.share_at(5)[0] == 0.5
    assert found.share_at(8)[0] == 0.5
    assert found.chance_at(8) == 0.25  # "c" and "a" against "b" and "a"
    assert found.switches_per_1000_tokens == 1000 * 5 / 14
    assert found.counts_at_end(3) == [1, 0, 1]
    assert found.segment_nll is None


def test_segments_of_several_tokens():
    found = measure_coherence(tokens_of("aabbbbbbcc"), byte_tokenizer(), classify, 2)
    assert found.labels.tolist() == [[0, 1, 1, 1, 2]]
    assert found.switches_per_1000_tokens == 1000 * 2 / 4 / 2


def test_segments_are_scored_one_by_one(tiny_model):
    config = tiny_model(vocab_size=259, bos_token_id=256).config
    torch.manual_seed(0)
    scorer = build_baseline(config).eval()
    tokens = torch.randint(0, 256, (2, 12))
    found = measure_coherence(tokens, byte_tokenizer(), lambda texts: np.zeros(len(texts), int), 3, scorer).segment_nll
    text = torch.cat([torch.tensor([256]), tokens[1, 6:9]])
    with torch.no_grad():
        logits = scorer(text[None, :-1]).logits[0]
    assert np.allclose(found[1, 2], F.cross_entropy(logits, text[1:]).item(), rtol=1e-5)
