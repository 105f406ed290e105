"""
Stratified plans: k samples that together cover the distribution of a plan, in NumPy.

The space of plans is split in two bit by bit, from the highest bit down, until no part has more than 1/k of the
probability. These parts are the *strata*. Systematic sampling (Madow 1949) chooses among them: it takes one uniform
offset u and the points (u + i) / k, i = 0 … k − 1, on the cumulative distribution, with the two halves of each part in
random order (Owen 1995). The bits below a stratum are sampled one by one, each by systematic sampling over the k plans
in a separate random order (a Latin hypercube, McKay et al. 1979). Finally the k plans are shuffled.

Each plan by itself is distributed exactly like an independent sample, up to float64 rounding. Together:

- the number of samples in each stratum, and in each part that was split, differs from its expectation by less than 1;
- a plan of probability 1/k or more is always sampled, and a less likely plan is sampled at most once;
- exactly half of 2^m samples from the uniform prior have any given bit set.

Systematic sampling of whole codes in order would keep the first property for every range of codes, but its points are
equally spaced under the uniform prior: all of 2^m samples have the same low bits, and 12 samples never have one
combination of bits H − 3 and H − 4. A model may use any of the bits, including these. The random order of halves and
the separately balanced low bits avoid this.
"""

from collections.abc import Callable

import numpy as np

# (bit, plans (..., k, H) whose higher bits are known) -> probability that the bit is 1, (..., k) or (..., 1)
BitChance = Callable[[int, np.ndarray], np.ndarray]

BELOW_ONE = np.nextafter(1.0, 0.0)


def numbers_per_set(num_samples: int, latent_dim: int) -> int:
    """Returns the number of random numbers that `stratify` needs for one set of plans."""
    return 1 + latent_dim + (latent_dim + 1) * num_samples


def stratify(chance: BitChance, num_samples: int, latent_dim: int, uniform: np.ndarray) -> np.ndarray:
    """
    Samples sets of k plans, each set stratified separately.

    Args:
        chance: the distribution of a plan, as conditional probabilities of its bits.
        num_samples: k.
        uniform: (..., S) random numbers in [0, 1), S = `numbers_per_set(k, H)`. They determine the plans.

    Returns:
        (..., k, H) bool, in random order.
    """
    k, sets = num_samples, uniform.shape[:-1]
    offset, thresholds, keys = np.split(uniform, [1, 1 + latent_dim], axis=-1)
    keys = keys.reshape(*sets, latent_dim + 1, k)
    orders = keys.argsort(-1, kind="stable")
    place = (np.arange(k) + offset) / k  # position of each sample in the cumulative distribution of its part
    probability = np.ones((*sets, k))  # of that part
    first = np.zeros((*sets, k), dtype=int)  # index of the first sample in that part; samples of a part are adjacent
    plans = np.zeros((*sets, k, latent_dim), dtype=bool)
    for bit in reversed(range(latent_dim)):
        one = np.broadcast_to(chance(bit, plans), place.shape)
        one_is_left = np.take_along_axis(keys[..., bit, :], first, axis=-1) < 0.5
        left, right = np.where(one_is_left, [one, 1 - one], [1 - one, one])
        is_right = place >= left
        systematic = is_right ^ one_is_left
        with np.errstate(divide="ignore", invalid="ignore"):
            place = np.where(is_right, (place - left) / right, place / left).clip(max=BELOW_ONE)
        balanced = _balanced(one, orders[..., bit, :], thresholds[..., bit, None])
        value = np.where(probability * k > 1, systematic, balanced)
        probability = probability * np.where(value, one, 1 - one)
        plans[..., bit] = value
        first = _first_of_run(first, value)
    return np.take_along_axis(plans, orders[..., latent_dim, :, None], axis=-2)


def _first_of_run(first: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Returns the first sample of each run, (..., k), after splitting runs where the value changes."""
    starts = first == np.arange(first.shape[-1])
    starts[..., 1:] |= value[..., 1:] != value[..., :-1]
    return np.maximum.accumulate(np.where(starts, np.arange(first.shape[-1]), 0), axis=-1)


def _balanced(chances: np.ndarray, order: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """
    Samples bits systematically with probabilities `chances`, (..., k).

    In the given order, the number of ones among the first samples differs from the sum of their chances by less than 1.
    """
    total = np.take_along_axis(chances, order, axis=-1).cumsum(-1) + threshold
    ones = np.diff(np.floor(total), axis=-1, prepend=0) > 0
    value = np.zeros(chances.shape, dtype=bool)
    np.put_along_axis(value, order, ones, axis=-1)
    return value


def chance_of_bits(probabilities: np.ndarray) -> BitChance:
    """Returns the distribution of independent bits with these probabilities of a 1, (..., H)."""
    return lambda bit, plans: probabilities[..., bit, None]


def chance_of_codes(probabilities: np.ndarray) -> BitChance:
    """Returns the distribution of a plan whose codes have these probabilities, (2^H,)."""
    latent_dim = len(probabilities).bit_length() - 1
    # indexed by the number of low bits summed over
    totals = [probabilities.reshape(-1, 2**low).sum(1) for low in range(latent_dim + 1)]

    def chance(bit: int, plans: np.ndarray) -> np.ndarray:
        high = plans[..., bit + 1 :] @ (1 << np.arange(latent_dim - bit - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            return totals[bit][2 * high + 1] / totals[bit + 1][high]

    return chance


def chance_of_prior(log_aggregate: np.ndarray | None, latent_dim: int) -> BitChance:
    """
    Returns the distribution of a plan under a prior.

    Args:
        log_aggregate: log-probabilities of the codes, (2^H,), or of each bit's values, (2, H); None for the uniform
            prior.
    """
    if log_aggregate is None:
        return chance_of_bits(np.full(latent_dim, 0.5))
    probabilities = np.exp(log_aggregate.astype(np.float64))
    if probabilities.ndim == 2:
        return chance_of_bits(probabilities[1])
    return chance_of_codes(probabilities / probabilities.sum())
