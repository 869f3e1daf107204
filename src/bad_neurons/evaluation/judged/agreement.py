"""How far two judges agree on the same answers: rank correlation, mean absolute error and bias, with intervals over questions.

Answers to one question are not independent, so whole questions are drawn for the intervals. What the published judges reach
among each other is the ceiling, and what one fixed score reaches the floor: a mean absolute error says nothing without it.

Legend: N answers, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from bad_neurons.evaluation.bootstrap import Estimate, estimate

_DRAWS = 2000

Numbers = npt.NDArray[np.float64]


class Correlation(TypedDict):
    """A rank correlation with its interval.

    Attributes:
        value: Spearman's correlation.
        ci95: ends of the 95 % percentile interval, over those draws in which neither judge gives all answers the same score.
    """

    value: float
    ci95: list[float]


class Agreement(TypedDict):
    """How far one judge agrees with another.

    Attributes:
        n: answers that have a score from both.
        spearman: None where one of them gives all answers the same score.
        mae: mean absolute difference, in points of the scale.
        bias: mean of the first judge's score minus the second's.
    """

    n: int
    spearman: Correlation | None
    mae: Estimate
    bias: Estimate


def agreement(scores: Sequence[float | None], others: Sequence[float | None], topics: Sequence[str], seed: int = 0) -> Agreement | None:
    """Agreement of a judge with another over those answers that have a score from both; None where there are none.

    Args:
        scores: the judge's score of each answer.
        others: the other one's.
        topics: the question of each answer.
        seed: seed of the draws.
    """
    both = [(a, b, topic) for a, b, topic in zip(scores, others, topics, strict=True) if a is not None and b is not None]
    if not both:
        return None
    ours, theirs = (np.array([pair[side] for pair in both], dtype=np.float64) for side in (0, 1))
    names = [topic for _, _, topic in both]
    difference = (ours - theirs).tolist()
    return {
        "n": len(both),
        "spearman": _correlation(ours, theirs, names, seed),
        "mae": estimate([abs(d) for d in difference], names, seed),
        "bias": estimate(difference, names, seed),
    }


def fixed_score(others: Sequence[float | None], topics: Sequence[str]) -> dict[str, Any]:
    """The one score that errs least if every answer gets it, and its mean absolute error: the floor of any judge."""
    given = [score for score in others if score is not None]
    score = float(np.median(given))
    floor = agreement([score] * len(others), others, topics)
    return {"score": score, "mae": floor and floor["mae"]}


def spearman(x: Numbers, y: Numbers, weights: Numbers) -> Numbers:
    """Spearman's rank correlations [D], ties by mean rank; NaN where a side is constant.

    Args:
        x: scores [N].
        y: other scores of the same answers [N].
        weights: [D, N], how often each answer counts in each of the D samples.
    """
    total = weights.sum(1, keepdims=True)
    ranks = [_ranks(side, weights) for side in (x, y)]
    a, b = (r - (weights * r).sum(1, keepdims=True) / total for r in ranks)
    size = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    found: Numbers = np.divide((weights * a * b).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)
    return found


def _ranks(values: Numbers, weights: Numbers) -> Numbers:
    """Rank from 1 [D, N] of each value in each sample, equal ones sharing the mean of their ranks."""
    _, first, index = np.unique(np.sort(values), return_index=True, return_inverse=True)
    order = np.argsort(values, kind="stable")
    counts = np.add.reduceat(weights[:, order], first, axis=1)
    ranks = np.empty_like(weights)
    ranks[:, order] = (counts.cumsum(1) - (counts - 1) / 2)[:, index]
    return ranks


def _correlation(ours: Numbers, theirs: Numbers, topics: Sequence[str], seed: int) -> Correlation | None:
    value = float(spearman(ours, theirs, np.ones((1, len(ours))))[0])
    if np.isnan(value):
        return None
    names, index = np.unique(np.asarray(topics), return_inverse=True)
    draws = np.random.default_rng(seed).integers(len(names), size=(_DRAWS, len(names)))
    times = np.stack([(draws == number).sum(1) for number in range(len(names))], axis=1)  # [D, questions]
    low, high = np.nanquantile(spearman(ours, theirs, times[:, index].astype(np.float64)), [0.025, 0.975])
    return {"value": value, "ci95": [float(low), float(high)]}
