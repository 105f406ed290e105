"""Whether the plan steers: known labels against plans, and labels of what is written under a plan."""

import numpy as np


def contingency(codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes that occur, (C,), and how often each goes with each label, (C, labels)."""
    seen, rows = np.unique(codes, return_inverse=True)
    table = np.zeros((len(seen), int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (rows, labels), 1)
    return seen, table


def mutual_information(codes: np.ndarray, labels: np.ndarray) -> float:
    """
    Mutual information of the empirical joint distribution, in bits.

    It overestimates by about (codes - 1)(labels - 1) / (2 N ln 2), which `mutual_information_bias` gives.
    """
    _, table = contingency(codes, labels)
    joint = table / table.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def mutual_information_bias(codes: np.ndarray, labels: np.ndarray) -> float:
    """What independent codes and labels would show by chance (Miller-Madow), in bits."""
    _, table = contingency(codes, labels)
    return float((table.shape[0] - 1) * (table.shape[1] - 1) / (2 * len(codes) * np.log(2)))


def agreement(labels: np.ndarray) -> tuple[float, float]:
    """
    Share of texts that carry the commonest label of their plan, and its standard error over plans.

    Args:
        labels: (plans, texts) of integers.
    """
    shares = np.array([np.bincount(row).max() / len(row) for row in labels])
    return float(shares.mean()), float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else float("nan")


def share_in_class(labels: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Share of texts that carry the label wanted of them, and its standard error."""
    hits = labels == wanted
    return float(hits.mean()), float((hits.mean() * (1 - hits.mean()) / len(hits)) ** 0.5)
