"""Scores of continuations for `lm-evaluation-harness`, averaged over plans."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Score = tuple[float, bool, float]  # log-likelihood in nats, whether each token is the most likely, standard error


@dataclass
class Row:
    """
    A text of a batch that ends in a continuation to score, and its scores under the plans so far.

    Attributes:
        prompt: tokens of the prompt.
        text: prompt and continuation, truncated on the left to the length that the model can read.
        targets: (M, N), M continuations of N tokens that differ only in their last token.
        whole: whether the text is a document that is scored as a whole.
        values: log-likelihoods of the continuations under each plan, (M,) each.
        probabilities: (N, V), next-token probabilities summed over plans. Each plan is weighted by the probability of
            the preceding tokens of the continuation.
        highest: (N, 1), the largest logarithm of these weights. All weights are divided by it.
    """

    prompt: list[int]
    text: list[int]
    targets: Tensor
    whole: bool
    values: list[Tensor]
    probabilities: Tensor | None = None
    highest: Tensor | None = None

    @property
    def start(self) -> int:
        """Index of the token from which the first token of the continuation is predicted."""
        return len(self.text) - self.targets.shape[1] - 1

    def add(self, log_probs: Tensor, log_weight: Tensor) -> None:
        """
        Adds the scores under one more plan.

        Args:
            log_probs: (N, V), log-probabilities of the continuation's tokens.
            log_weight: (), importance weight of the plan in nats.
        """
        of_tokens = [log_probs.gather(1, target[:, None])[:, 0] for target in self.targets]
        self.values.append(torch.stack([each.sum() for each in of_tokens]).double() + log_weight)
        if self.whole:  # greedy tokens of a document are not requested
            return
        weight = F.pad(of_tokens[0][:-1].double().cumsum(0), (1, 0))[:, None]
        probabilities = log_probs.float().exp()
        if self.probabilities is None or self.highest is None:
            self.probabilities, self.highest = probabilities, weight
            return
        highest = torch.maximum(self.highest, weight)
        self.probabilities *= (self.highest - highest).exp().float()
        self.probabilities += probabilities * (weight - highest).exp().float()
        self.highest = highest

    def answers(self) -> list[Score]:
        """Returns the score of each continuation."""
        means, errors = log_mean_exp(torch.stack(self.values))
        greedy = [False] * len(means)
        if self.probabilities is not None:
            greedy = (self.probabilities.argmax(-1) == self.targets).all(-1).tolist()
        return list(zip(means.tolist(), greedy, errors.tolist(), strict=True))


def log_mean_exp(values: Tensor) -> tuple[Tensor, Tensor]:
    """
    Computes `log mean_s exp(values[s])` of S samples, (S, ...) -> (...), and its standard error by the delta method,
    which is NaN for a single sample. If all samples are equal, the result is bit-for-bit that value.
    """
    highest = values.amax(0)
    weights = (values - highest).exp()
    mean = weights.mean(0)
    spread = weights.std(0) if len(values) > 1 else torch.full_like(mean, math.nan)
    return highest + mean.log(), spread / (math.sqrt(len(values)) * mean)
