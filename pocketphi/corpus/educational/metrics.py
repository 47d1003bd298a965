"""Figures for a scorer: ranking, agreement, calibration. Plain numpy; ties are handled everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values share the mean of theirs; float64, same shape."""
    values = np.asarray(values)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse]


def roc_auc(high: np.ndarray, low: np.ndarray) -> float:
    """Probability that a member of `high` scores above one of `low` (half for a tie); NaN if one is empty."""
    if not len(high) or not len(low):
        return float("nan")
    rank = ranks(np.concatenate([high, low]))
    return float((rank[: len(high)].sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation; NaN when one side is constant."""
    if len(left) < 2:
        return float("nan")
    a, b = ranks(left), ranks(right)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def classification(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Precision, recall, F1 and accuracy of "at least `threshold`", scores against labels."""
    truth, said = labels >= threshold, scores >= threshold
    hits = float((truth & said).sum())
    precision = hits / max(1.0, float(said.sum()))
    recall = hits / max(1.0, float(truth.sum()))
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-12, precision + recall),
        "accuracy": float((truth == said).mean()) if len(truth) else float("nan"),
    }


def confusion(labels: np.ndarray, scores: np.ndarray) -> list[list[int]]:
    """Counts [6][6]: rounded label by rounded score."""
    table = np.zeros((6, 6), dtype=np.int64)
    rounded = (np.clip(np.floor(np.asarray(v) + 0.5), 0, 5).astype(int) for v in (labels, scores))
    np.add.at(table, tuple(rounded), 1)
    return table.tolist()


def isotonic(values: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the non-decreasing fit of `targets` at `values` (weighted least squares), in their order."""
    order = np.argsort(values, kind="stable")
    # Equal values must get equal fits: start from one block per distinct value.
    _, block = np.unique(values[order], return_inverse=True)
    weight = np.bincount(block, weights=weights[order])
    mean = np.bincount(block, weights=weights[order] * targets[order]) / np.maximum(weight, 1e-300)
    means: list[float] = []
    masses: list[float] = []
    sizes: list[int] = []
    for value, mass in zip(mean.tolist(), weight.tolist()):
        means.append(value)
        masses.append(mass)
        sizes.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            total = masses[-2] + masses[-1]
            means[-2] = (means[-2] * masses[-2] + means[-1] * masses[-1]) / total
            masses[-2] = total
            sizes[-2] += sizes[-1]
            means.pop(), masses.pop(), sizes.pop()
    fitted = np.repeat(means, sizes)[block]
    result = np.empty(len(values))
    result[order] = fitted
    return result


def calibration(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray, num_bins: int = 10
) -> tuple[float, list[dict[str, Any]]]:
    """Return (weighted mean |mean label - mean score| over bins of the scale, the bins that hold anything)."""
    place = np.clip((np.asarray(scores) / 5.0 * num_bins).astype(int), 0, num_bins - 1)
    rows: list[dict[str, Any]] = []
    error = 0.0
    for number in range(num_bins):
        chosen = place == number
        if not chosen.any():
            continue
        mass = float(weights[chosen].sum())
        label = float(np.average(labels[chosen], weights=weights[chosen]))
        score = float(np.average(scores[chosen], weights=weights[chosen]))
        error += mass * abs(label - score)
        rows.append({"documents": int(chosen.sum()), "mean_score": score, "mean_label": label})
    return error / float(weights.sum()), rows
