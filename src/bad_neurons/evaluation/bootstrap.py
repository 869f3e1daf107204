"""Bootstrap intervals over topics: items of one topic are not independent, so whole topics are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000


class Estimate(TypedDict):
    """A mean with its interval.

    Attributes:
        mean: mean over items.
        ci95: ends of the 95 % percentile interval; both equal the mean where there is one topic only.
    """

    mean: float
    ci95: list[float]


def estimate(values: Sequence[float], topics: Sequence[str], seed: int = 0) -> Estimate:
    """Mean of ``values`` and its 95 % interval by drawing topics with replacement (2,000 draws).

    Args:
        values: one number an item.
        topics: the topic of each item.
        seed: seed of the draws.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no values to estimate a mean from")
    names, index = np.unique(np.asarray(topics), return_inverse=True)
    numbers = np.asarray(values, dtype=np.float64)
    sums = np.bincount(index, weights=numbers, minlength=len(names))
    counts = np.bincount(index, minlength=len(names))
    draws = draw_topics(len(names), seed)
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(numbers.mean()), "ci95": [float(low), float(high)]}


def draw_topics(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Topics drawn with replacement, as many as there are, 2,000 times: [2000, count] numbers below ``count``."""
    return np.random.default_rng(seed).integers(count, size=(_DRAWS, count))


def estimate_over(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> Estimate | None:
    """Mean of ``value`` over rows that have a ``topic``, with its interval; None where there are no rows."""
    return estimate([float(value(row)) for row in rows], [row["topic"] for row in rows]) if rows else None
