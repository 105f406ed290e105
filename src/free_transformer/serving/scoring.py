"""Log-probabilities of new tokens, and of a prompt averaged over plans."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NOT_FINITE = "the model's logits are NaN or infinite"
PromptLogits = Iterator[tuple[int, int, np.ndarray]]


@dataclass
class TokenScore:
    """
    The log-probability of a token.

    Attributes:
        log_prob: None for the first token of a text, which is not predicted.
        top: the most likely tokens at this position and their log-probabilities, the most likely first.
    """

    token: int
    log_prob: float | None
    top: list[tuple[int, float]]


@dataclass
class PromptScores:
    """
    Scores of a prompt computed so far.

    Attributes:
        scores: scores of the tokens, from the first one on.
        next_log_probs: (V,) log-probabilities of the next token.
    """

    scores: list[TokenScore]
    next_log_probs: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Computes log-softmax in double precision. Raises `ValueError` for logits that are NaN or infinite."""
    logits = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise ValueError(NOT_FINITE)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def token_scores(log_probs: np.ndarray, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Scores one token per row of log-probabilities, (C, V), with the `top` most likely tokens of each row."""
    found = []
    for row, token in zip(log_probs, tokens, strict=False):
        best = np.argpartition(-row, min(top, len(row) - 1))[:top] if top else np.zeros(0, dtype=int)
        best = best[np.argsort(-row[best], kind="stable")]
        found.append(TokenScore(token, float(row[token]), [(int(each), float(row[each])) for each in best]))
    return found


def score_prompt(
    tokens: list[int], logits_of_parts: PromptLogits, top: int, log_weights: np.ndarray
) -> Iterator[PromptScores]:
    r"""
    Computes log-probabilities of a prompt's tokens, averaged over plans: `p(x) = \sum_s w_s p(x | Z_s)`.

    Args:
        logits_of_parts: see `Batch.prompt_logits`.
        top: number of most likely tokens to list at each position.
        log_weights: (S,), log w of the S plans.

    Yields:
        the scores computed so far, after each part.
    """
    scores = [TokenScore(tokens[0], None, [])]
    log_weights = log_weights.copy()  # later w_s p(x_<t | Z_s)
    mixture, total = np.zeros((0, 0)), np.zeros(0)
    for start, which, logits in logits_of_parts:
        log_probs = log_softmax(logits)
        following = tokens[start + 1 : start + 1 + len(log_probs)]
        own = log_probs[np.arange(len(following)), following]
        before = log_weights[which] + np.concatenate([[0.0], own.cumsum()])[: len(log_probs)]
        log_weights[which] += own.sum()
        if len(log_weights) > 1:
            log_probs += before[:, None]
            mixture = log_probs if which == 0 else np.logaddexp(mixture, log_probs)
            total = before if which == 0 else np.logaddexp(total, before)
            log_probs = mixture - total[:, None]
        if which == len(log_weights) - 1:
            scores += token_scores(log_probs, following, top)
        yield PromptScores(scores, log_probs[-1])
