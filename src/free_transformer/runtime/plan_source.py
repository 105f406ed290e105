"""
Sources of a text's plans, in NumPy: given by the caller, inferred from the prompt by the encoder, or sampled from the
prior.

An empty prompt (only the begin-of-text token) always uses the prior. `model.plan_source` implements the same rule in
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from free_transformer.errors import InputError
from free_transformer.model.plan_text import parse_bits
from free_transformer.model.sampling import check_plan_count
from free_transformer.model.stratified import chance_of_bits, chance_of_prior, numbers_per_set, stratify

Count = TypeVar("Count", int, np.ndarray)


@dataclass(frozen=True)
class PlanSource:
    """
    Candidates for the plans of B texts. A text uses the given plans first, then plans inferred from its prompt, then
    sampled plans.

    Attributes:
        given: (B, G, H) bool, the first plans of each text, chosen by the caller.
        read: (B, R, H) bool, the first plans of each text, sampled from the posterior of its prompt.
        num_read: (B,) number of plans in `read` that each text may use; see `num_plans_to_read`.
        sampled: (B, S, H) bool, the last plans of each text, sampled from the prior.
    """

    given: np.ndarray
    read: np.ndarray
    num_read: np.ndarray
    sampled: np.ndarray

    def complete(self, num_plans: int) -> np.ndarray:
        """
        Chooses among the candidates.

        Returns:
            (B, num_plans, H) bool.

        Raises:
            ValueError: if a text has no candidate for one of its plans.
        """
        batch, num_given, latent_dim = self.given.shape
        first_sampled = num_plans - self.sampled.shape[1]
        known = np.maximum(num_given, np.minimum(self.num_read, self.read.shape[1]))
        if first_sampled > known.min(initial=num_plans):
            raise ValueError(
                f"{num_plans} plans are needed, but only {int(known.min())} are given or read and "
                f"{self.sampled.shape[1]} are sampled"
            )
        plan = np.zeros((batch, num_plans, latent_dim), dtype=bool)
        plan[:, max(first_sampled, 0) :] = self.sampled[:, max(-first_sampled, 0) :]
        read = self.read[:, :num_plans]
        is_read = np.arange(read.shape[1]) < self.num_read[:, None]
        plan[:, : read.shape[1]] = np.where(is_read[..., None], read, plan[:, : read.shape[1]])
        plan[:, :num_given] = self.given[:, :num_plans]
        return plan


def num_plans(plan_span: int | str, num_tokens: Count) -> Count:
    """Returns the number of plans of a text with `num_tokens` tokens, an integer or an array."""
    if plan_span == "sequence":
        return 0 * num_tokens + 1
    return -(-num_tokens // int(plan_span))


def num_plans_to_read(
    tokens: np.ndarray, mask: np.ndarray, prompt_plan: str, plan_span: int | str, begin_token: int | None
) -> np.ndarray:
    """
    Returns the number of plans that the encoder infers from each prompt, (B,): 0 with `prompt_plan="prior"`, and for a
    prompt that contains only the begin-of-text token.

    Args:
        tokens: (B, T).
        mask: (B, T), 0 on padding.
        begin_token: the begin-of-text token, None for a model without one.
    """
    has_text = ((tokens != begin_token) & (mask == 1)).any(1)
    return np.where(has_text & (prompt_plan == "posterior"), num_plans(plan_span, mask.sum(1)), 0)


def given_plan(
    plan: ArrayLike | None, batch: int, latent_dim: int, plan_span: int | str, names: Mapping[str, str] | None = None
) -> np.ndarray:
    """
    Checks a plan given by the caller.

    Args:
        plan: (P, H) or (B, P, H), bool or 0/1, text such as `"0110"`, or one of `names`; None for no plan.

    Returns:
        (B, P, H) bool, with P = 0 for no plan.

    Raises:
        ValueError: for another shape, values other than bits, or several plans if one covers the whole text.
    """
    if plan is None:
        return np.zeros((batch, 0, latent_dim), dtype=bool)
    if isinstance(plan, str):
        bits = parse_bits(plan, latent_dim, names)
    else:
        try:
            bits = np.asarray(plan)
        except ValueError as error:
            raise InputError("plan: texts have different numbers of plans; all need the same number") from error
    if bits.ndim == 2:
        bits = np.broadcast_to(bits, (batch, *bits.shape))
    if bits.ndim != 3 or bits.shape[0] != batch or bits.shape[2] != latent_dim or bits.shape[1] == 0:
        raise InputError(
            f"plan of shape {bits.shape}: expected (P, {latent_dim}) or ({batch}, P, {latent_dim}), P plans of "
            f"{latent_dim} bits for {batch} texts"
        )
    if not np.isin(bits, (0, 1)).all():
        raise InputError("the plan holds values other than bits (bool or 0/1)")
    check_plan_count(bits.shape[1], plan_span)
    return bits.astype(bool)


def average_posterior(logits: ArrayLike) -> np.ndarray:
    """Returns the mean probability of a 1 for each bit, (P, H), from the posterior's logits of windows, (N, P, H)."""
    mean: np.ndarray = _chances(np.asarray(logits)).mean(0)
    return mean


def _chances(logits: np.ndarray) -> np.ndarray:
    """Returns the probability of a 1 for each bit, in float64."""
    with np.errstate(over="ignore"):  # for a bit whose probability rounds to 0
        chances: np.ndarray = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return chances


def sample_posterior(logits: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """
    Samples plans from the posterior.

    Args:
        logits: (..., H) of the encoder.
        uniform: random numbers in [0, 1), of the same shape. The plans are a function of them.

    Returns:
        (..., H) bool.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # for a bit whose probability rounds to 0
        return uniform * (1 + np.exp(-logits.astype(np.float64))) < 1


def sample_stratified_posterior(logits: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """
    Samples k plans for each prompt from the posterior, stratified (see `model.stratified`).

    With k = 1 they are independent.

    Args:
        logits: (B, P, H) of the encoder.

    Returns:
        (B * k, P, H) bool; the k plans of a prompt are consecutive.
    """
    if num_samples == 1:
        return sample_posterior(logits, rng.random(logits.shape))
    chance = chance_of_bits(_chances(logits))
    batch, num_plans, latent_dim = logits.shape
    uniform = rng.random((batch, num_plans, numbers_per_set(num_samples, latent_dim)))
    return (
        stratify(chance, num_samples, latent_dim, uniform)
        .swapaxes(1, 2)
        .reshape(batch * num_samples, num_plans, latent_dim)
    )


def sample_stratified_prior(
    shape: tuple[int, int],
    latent_dim: int,
    log_aggregate: np.ndarray | None,
    rng: np.random.Generator,
    num_samples: int,
) -> np.ndarray:
    """
    Same as `sample_prior`, but stratified over each k consecutive texts (see `model.stratified`).

    Args:
        shape: B, a multiple of k, and P, the number of plans per text. With a larger P, the first plans stay the same.
        num_samples: k.

    Returns:
        (B, P, H) bool.
    """
    batch, num_plans = shape
    if num_samples == 1:
        return sample_prior((num_plans, batch), latent_dim, log_aggregate, rng).swapaxes(0, 1)
    uniform = rng.random((num_plans, batch // num_samples, numbers_per_set(num_samples, latent_dim)))
    plans = stratify(chance_of_prior(log_aggregate, latent_dim), num_samples, latent_dim, uniform)
    return plans.reshape(num_plans, batch, latent_dim).swapaxes(0, 1)


def sample_prior(
    shape: tuple[int, ...], latent_dim: int, log_aggregate: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """
    Samples plans from the uniform prior or the aggregate prior.

    Args:
        log_aggregate: log-probabilities of the codes, (2^H,), or of each bit's values, (2, H); None for the uniform
            prior.

    Returns:
        (*shape, H) bool.
    """
    if log_aggregate is None:
        return rng.random((*shape, latent_dim)) < 0.5
    probabilities = np.exp(log_aggregate.astype(np.float64))
    if probabilities.ndim == 2:
        return rng.random((*shape, latent_dim)) < probabilities[1]
    codes = rng.choice(len(probabilities), size=shape, p=probabilities / probabilities.sum())
    return (codes[..., None] >> np.arange(latent_dim)) % 2 == 1
