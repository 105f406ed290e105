"""A Free Transformer against its baseline, by the numbers that may stand side by side."""

from dataclasses import dataclass

import numpy as np

from free_transformer.evaluation.likelihood import Likelihood, ratio_standard_error


@dataclass
class Comparison:
    """
    Nats per token, on the same documents.

    Attributes:
        difference: nll of the Free Transformer minus the baseline's; negative is better than the baseline.
        standard_error: of the difference, documents paired.
        elbo_difference: the same for the ELBO, the pessimistic bound.
    """

    nll: float
    baseline_nll: float
    difference: float
    standard_error: float
    elbo_difference: float


def compare(free: Likelihood, baseline: Likelihood) -> Comparison:
    """`ValueError` unless both were evaluated on the same documents."""
    tokens = free.per_document["tokens"]
    if not np.array_equal(free.per_document["fingerprint"], baseline.per_document["fingerprint"]):
        raise ValueError(
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
