"""Diversity, coherence and quality of generated texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from free_transformer.errors import InputError
from free_transformer.evaluation.control import Classifier

Estimate = tuple[float, float]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams (Li et al. 2016, arXiv:1510.03055). It decreases with the number of texts."""
    grams = [gram for text in texts for gram in _grams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def self_bleu(texts: Sequence[str], most: int = 100) -> float:
    """
    Mean BLEU of each text against the others, 0 to 100 (Zhu et al. 2018, arXiv:1802.01886). Lower is more diverse.

    Args:
        most: maximum number of texts to compare, evenly spaced. The time grows with its square.

    Raises:
        ImportError: without `sacrebleu`, which the extra `diversity` installs.
    """
    from sacrebleu.metrics import BLEU

    chosen = list(texts)[:: -(-len(texts) // most)]
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, [*chosen[:index], *chosen[index + 1 :]]).score for index, text in enumerate(chosen)
    ]
    return float(np.mean(scores))


def label_entropy(labels: np.ndarray) -> float:
    """Entropy of the labels in bits."""
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def halves_agree(texts: Sequence[str], classify: Classifier) -> np.ndarray:
    """Whether the classifier assigns the same label to both halves of each text, (N,) bool."""
    return classify([text[: len(text) // 2] for text in texts]) == classify([text[len(text) // 2 :] for text in texts])


@torch.no_grad()
def reference_nll(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> np.ndarray:
    """
    Negative log-likelihood of each text under another causal language model, (N,), in nats per token.

    Args:
        reference: a baseline, or any causal language model that uses `tokenizer`. Texts start with begin-of-text.
    """
    scores = []
    for start in range(0, len(texts), batch_size):
        part = [f"{tokenizer.bos_token}{text}" for text in texts[start : start + batch_size]]
        batch = tokenizer(part, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        tokens = batch["input_ids"].to(reference.device)
        target = tokens[:, 1:].masked_fill(batch["attention_mask"][:, 1:].to(tokens) == 0, -100)
        scores.append(mean_nll(reference, tokens, target))
    return torch.cat(scores).cpu().numpy()


@torch.no_grad()
def mean_nll(reference: PreTrainedModel, tokens: Tensor, target: Tensor) -> Tensor:
    """
    Mean negative log-likelihood of each row under a causal language model, (B,), in nats per token.

    Args:
        tokens: (B, T), begin-of-text first; target: (B, T - 1), the next tokens, -100 for padding.
    """
    logits = reference(tokens, use_cache=False).logits[:, :-1].float().transpose(1, 2)
    nats = F.cross_entropy(logits, target, reduction="none").sum(1)
    return nats / (target != -100).sum(1).clamp(min=1)


@dataclass
class Diversity:
    """
    Means and their standard errors. The first three are means over parts of the texts, since they depend on the number
    of texts.

    Attributes:
        distinct: share of distinct word bigrams.
        self_bleu: 0 to 100. None without `sacrebleu`.
        label_entropy: entropy of the classifier's labels, in bits.
        coherence: share of texts whose halves have the same label.
        quality: negative log-likelihood under a reference model, in nats per token. None without a reference.
    """

    distinct: Estimate
    self_bleu: Estimate | None
    label_entropy: Estimate
    coherence: Estimate
    quality: Estimate | None


def measure_diversity(
    texts: Sequence[str],
    classify: Classifier,
    reference: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    parts: int = 10,
) -> Diversity:
    """
    Measures the diversity, coherence and quality of generated texts.

    Args:
        texts: at least `2 * parts` texts in random order.
        classify: texts -> (N,) integer labels.
        reference: causal language model for `quality`, with its `tokenizer`.
        parts: number of parts over which diversity is averaged.

    Raises:
        InputError: for too few texts.
    """
    if len(texts) < 2 * parts:
        raise InputError(f"{len(texts)} texts: at least {2 * parts} are needed for {parts} parts")
    labels = classify(texts)
    split = [texts[part::parts] for part in range(parts)]
    try:
        bleu = _mean([self_bleu(each) for each in split])
    except ImportError:
        bleu = None
    return Diversity(
        distinct=_mean([distinct_n(each) for each in split]),
        self_bleu=bleu,
        label_entropy=_mean([label_entropy(labels[part::parts]) for part in range(parts)]),
        coherence=_mean(halves_agree(texts, classify)),
        quality=None if reference is None else _mean(reference_nll(reference, tokenizer, texts)),
    )


def _mean(values: Sequence[float] | np.ndarray) -> Estimate:
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5)
