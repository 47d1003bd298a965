"""Statistics of paired differences: the same items, two models.

Pairing removes what both models share, the difficulty of the items: on one benchmark two models' scores
each have a standard error of several points, and their difference often a third of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """B minus A over n items.

    low, high: percentile interval of the paired bootstrap. stderr: of the mean (or ratio) of the
    differences. p_value: exact sign test (McNemar) where items are right or wrong, else from
    difference / stderr by the normal distribution; None where n is too small to say.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    p_value: float | None
    test: str
    better: int
    worse: int
    n: int


def difference(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return sum(b - a) / sum(weights) with its errors; weights default to one per item.

    a, b: per item [n]; weights [n]: bytes of the documents for bits per byte. Items are resampled
    in pairs, documents as a whole.
    """
    change = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    n = len(change)
    if n == 0:
        raise ValueError("no items")
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    value = float(change.sum() / weight.sum())
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    if n < 2:
        return Difference(value, None, None, None, None, "one item", better, worse, n)
    residual = change - value * weight
    stderr = float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / weight.sum())
    low, high = bootstrap(change, weight, resamples, confidence, seed)
    binary = weights is None and bool(np.isin(change, (-1.0, 0.0, 1.0)).all())
    p_value: float | None
    if binary:
        p_value, test = sign_test(better, worse), "exact sign test"
    elif stderr:
        p_value, test = math.erfc(abs(value) / stderr / math.sqrt(2)), "normal"
    else:
        p_value, test = (1.0 if value == 0 else None), "no spread"
    return Difference(value, stderr, low, high, p_value, test, better, worse, n)


def bootstrap(
    change: np.ndarray, weight: np.ndarray, resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Percentile interval of sum(change) / sum(weight) over resampled items, [n] each."""
    rng = np.random.default_rng(seed)
    pairs, counts = np.unique(np.stack([change, weight], axis=1), axis=0, return_counts=True)
    n = len(change)
    found = np.empty(resamples)
    # Equal items are interchangeable: drawing how often each kind occurs is the same draw, and for
    # right-or-wrong items there are three kinds however long the list.
    step = max(1, 4_000_000 // len(pairs))
    for start in range(0, resamples, step):
        drawn = rng.multinomial(n, counts / n, size=min(step, resamples - start))
        found[start : start + len(drawn)] = (drawn @ pairs[:, 0]) / (drawn @ pairs[:, 1])
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact probability of so uneven a split of the items that changed, if a coin decided."""
    n, fewer = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    top = max(logs)
    tail = math.exp(top - n * math.log(2)) * sum(math.exp(x - top) for x in logs)
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: what each p-value becomes when that many questions were asked at once."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
