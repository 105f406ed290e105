"""Measures whether long generated texts keep their initial style, segment by segment."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.evaluation.control import Classifier, Share, share_in_class
from free_transformer.evaluation.diversity import mean_nll

BEGINNING = slice(1, 4)  # segments that determine the style of a text; the first segment may be a title


@dataclass
class Coherence:
    """
    Labels of consecutive segments of long texts.

    Attributes:
        labels: (N, S), the label of each segment of each text.
        segment_tokens: tokens per segment.
        segment_nll: (N, S), mean NLL of each segment under another model, in nats per token. None without one.
    """

    labels: np.ndarray
    segment_tokens: int
    segment_nll: np.ndarray | None = None

    @property
    def beginning(self) -> np.ndarray:
        """(N,), the most common label of segments 2 to 4 of each text."""
        return np.array([np.bincount(row).argmax() for row in self.labels[:, BEGINNING]])

    def share_at(self, segment: int) -> Share:
        """Share of texts whose segment, counted from 1, has the label of the beginning, and its standard error."""
        return share_in_class(self.labels[:, segment - 1], self.beginning)

    def chance_at(self, segment: int) -> float:
        """`share_at` if the label of the segment did not depend on the beginning: two texts drawn with replacement."""
        return float((self.labels[:, segment - 1, None] == self.beginning).mean())

    @property
    def switches_per_1000_tokens(self) -> float:
        """How often the label changes from one segment to the next, per 1,000 tokens."""
        return float((self.labels[:, 1:] != self.labels[:, :-1]).mean() * 1000 / self.segment_tokens)

    def counts_at_end(self, num_labels: int) -> list[int]:
        """How many texts end in each label."""
        return np.bincount(self.labels[:, -1], minlength=num_labels).tolist()


def measure_coherence(
    tokens: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    classify: Classifier,
    segment_tokens: int,
    scorer: PreTrainedModel | None = None,
) -> Coherence:
    """
    Classifies consecutive segments of long texts.

    Args:
        tokens: (N, L), texts without the begin-of-text token; L is a multiple of `segment_tokens` and at least four
            segments long.
        classify: texts -> (N,) integer labels. The classifier sees one segment at a time.
        scorer: a model without a plan that was trained independently of the one that generated the texts. Each
            segment is scored by itself, after a begin-of-text token.
    """
    count, length = tokens.shape
    segments = tokens.reshape(count * (length // segment_tokens), segment_tokens)
    labels = classify(tokenizer.batch_decode(segments, skip_special_tokens=True)).reshape(count, -1)
    nll = None if scorer is None else _segment_nll(scorer, segments, tokenizer.bos_token_id).reshape(count, -1)
    return Coherence(labels, segment_tokens, nll)


def _segment_nll(scorer: PreTrainedModel, segments: Tensor, begin: int, batch_size: int = 256) -> np.ndarray:
    """Mean NLL of each segment, (N, T) -> (N,), in nats per token."""
    parts = segments.to(scorer.device).split(batch_size)
    return torch.cat([mean_nll(scorer, F.pad(part, (1, 0), value=begin), part) for part in parts]).cpu().numpy()
