"""Accuracy and AUROC of probes, with draws of whole topics, so that differences of probes have intervals too.

All probes of one side see the same draws: the difference of two of them is paired.

Legend: M answers, T topics, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bad_neurons.evaluation.bootstrap import Estimate, draw_topics

Floats = NDArray[np.float64]


class Measured(NamedTuple):
    """A measure, and the same in each draw of topics.

    Attributes:
        value: on the answers as they are.
        draws: [B]; not a number where a draw has answers of one label only.
    """

    value: float
    draws: Floats

    def minus(self, other: Measured) -> Measured:
        """The difference of two measures of the same answers."""
        return Measured(self.value - other.value, self.draws - other.draws)

    def estimate(self) -> Estimate:
        """The value with its 95 % percentile interval; both ends equal the value where no draw has one."""
        draws = self.draws[np.isfinite(self.draws)]
        low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (self.value, self.value)
        return {"mean": self.value, "ci95": [float(low), float(high)]}


def mean_of(measured: Sequence[Measured]) -> Measured:
    """The mean over several divisions of the topics, whose draws are of the same topics."""
    return Measured(float(np.mean([m.value for m in measured])), np.mean([m.draws for m in measured], axis=0))


def topic_counts(topics: int, seed: int = 0) -> Floats:
    """How often each of ``topics`` topics is in each draw, [B, T]."""
    counts = np.zeros((len(draws := draw_topics(topics, seed)), topics))
    np.add.at(counts, (np.arange(len(draws))[:, None], draws), 1)
    return counts


class Measures:
    """Measures of probes on one side of a split.

    Args:
        y: labels [M], 1 is sycophantic; both are there.
        topics: number of the topic of each answer, [M].
        counts: how often each topic is in each draw, [B, T].
    """

    def __init__(self, y: NDArray[np.bool_], topics: NDArray[np.int64], counts: Floats) -> None:
        self._y, self._topics, self._counts = y, topics, counts

    def accuracy(self, logits: Floats) -> Measured:
        """Share of answers on the right side of log-odds 0, of log-odds [M]."""
        right = (logits > 0) == self._y
        with np.errstate(invalid="ignore"):  # no answer in a draw
            draws = (self._counts @ self._per_topic(self._topics, right)) / (self._counts @ self._per_topic(self._topics))
        return Measured(float(right.mean()), draws)

    def auroc(self, logits: Floats) -> Measured:
        """Share of pairs of a sycophantic and an honest answer that log-odds [M] put in order; ties count half.

        A draw weighs a pair by how often the topics of both are in it, so all draws follow from the pairs that are in order
        between each two topics, [T, T].
        """
        positive, of_positive = logits[self._y], self._topics[self._y]
        negative, of_negative = logits[~self._y], self._topics[~self._y]
        order = np.zeros((self._counts.shape[1],) * 2)
        for topic in np.unique(of_negative):
            below = np.sort(negative[of_negative == topic])
            pairs = (np.searchsorted(below, positive) + np.searchsorted(below, positive, side="right")) / 2
            order[:, topic] = self._per_topic(of_positive, pairs)
        with np.errstate(invalid="ignore"):  # a draw with one label
            there = (self._counts @ self._per_topic(of_positive)) * (self._counts @ self._per_topic(of_negative))
            draws = ((self._counts @ order) * self._counts).sum(1) / there
        return Measured(float(order.sum() / (len(positive) * len(negative))), draws)

    def _per_topic(self, topics: NDArray[np.int64], values: NDArray[np.generic] | None = None) -> Floats:
        """Sum of the values of each topic, or number of answers, [T]."""
        sums: Floats = np.bincount(topics, values, minlength=self._counts.shape[1]).astype(np.float64)
        return sums
