"""Compares the likelihood of a Free Transformer with that of its baseline."""

from dataclasses import dataclass

import numpy as np

from free_transformer.errors import InputError
from free_transformer.evaluation.likelihood import Likelihood, ratio_standard_error


@dataclass
class Comparison:
    """
    Likelihoods on the same documents, in nats per token.

    Attributes:
        nll: negative log-likelihood of the Free Transformer.
        baseline_nll: negative log-likelihood of the baseline.
        difference: `nll - baseline_nll`. Negative values mean that the Free Transformer is better.
        standard_error: standard error of the difference, paired by document.
        elbo_difference: ELBO of the Free Transformer minus `baseline_nll`, an upper bound of the difference.
    """

    nll: float
    baseline_nll: float
    difference: float
    standard_error: float
    elbo_difference: float


def compare(free: Likelihood, baseline: Likelihood) -> Comparison:
    """
    Compares two evaluations of the same documents.

    Raises:
        InputError: if the evaluations are of different documents.
    """
    tokens = free.per_document["tokens"]
    if not np.array_equal(free.per_document["fingerprint"], baseline.per_document["fingerprint"]):
        raise InputError(
            f"the two runs were evaluated on different text: {free.documents} documents of {free.tokens} tokens "
            f"against {baseline.documents} of {baseline.tokens}"
        )
    nll = free.per_document["nll"] - baseline.per_document["nll"]
    elbo = free.per_document["elbo"] - baseline.per_document["nll"]
    return Comparison(
        nll=free.nll,
        baseline_nll=baseline.nll,
        difference=float(nll.sum() / tokens.sum()),
        standard_error=ratio_standard_error(nll, tokens),
        elbo_difference=float(elbo.sum() / tokens.sum()),
    )
