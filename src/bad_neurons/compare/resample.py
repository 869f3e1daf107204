"""Intervals for means over topics and seeds.

A number of a comparison is a mean over the seeds of a method and the topics of a suite, and both could have been others. So
both are drawn with replacement, and the changes of the mean that the two draws cause by themselves are added. For a mean
of seed effect + topic effect + noise of the two together, this has the variance of the mean but for the noise, which counts
twice: a little too wide, as with every bootstrap of two crossed factors (Owen 2007, doi 10.1214/07-AOAS122), where drawing
both at once counts it three times.

A plain percentile interval is too narrow for a few seeds: with five, it would hold the truth 84 times in 100. Each
draw is therefore stretched by ``expansion(n)``, after which the interval of a mean of n normal numbers is about the t
interval (the "expanded percentile" of Hesterberg 2015, arXiv 1411.5279).

One draw of topics serves all methods, and one draw of seeds all suites and all methods that were trained with the same seeds: what
they share goes out of their differences. A seed draws the training records and their order, so methods do share what it brings.

Legend: S seeds, T topics, K numbers side by side, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from scipy import stats

from bad_neurons.compare.measured import Array

_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Estimates:
    """K numbers, and what they would have been in R other draws of topics and seeds; sums and differences are taken draw by draw.

    Attributes:
        value: the numbers, [K]; NaN where there is none.
        draws: the same in each draw, [R, K].
    """

    value: Array
    draws: Array

    def __add__(self, other: Estimates) -> Estimates:
        return Estimates(self.value + other.value, self.draws + other.draws)

    def __sub__(self, other: Estimates) -> Estimates:
        return Estimates(self.value - other.value, self.draws - other.draws)

    def removed_from(self, before: Estimates) -> Estimates:
        """The share of ``before`` that is gone: ``1 - self / before``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimates(1 - self.value / before.value, 1 - self.draws / before.draws)

    def columns(self, name: str, varied: bool = True) -> dict[str, Array]:
        """The numbers and the ends of their 95 % intervals, [K] each, under ``name``, ``name_low`` and ``name_high``.

        Args:
            name: of the number.
            varied: whether anything was drawn that could differ; without it there is no interval, and its ends are NaN.
        """
        low, high = np.quantile(self.draws, _ENDS, axis=0) if varied else np.full((2, *self.value.shape), np.nan)
        return {name: self.value, f"{name}_low": low, f"{name}_high": high}


def mean_of(estimates: Sequence[Estimates]) -> Estimates:
    """Mean of several, draw by draw."""
    return Estimates(np.mean([e.value for e in estimates], 0), np.mean([e.draws for e in estimates], 0))


def expansion(n: int) -> float:
    """How much a draw of n is stretched: the width of a 95 % t interval over that of a percentile interval; 0 for n = 1."""
    return float(np.sqrt(n / (n - 1)) * stats.t.ppf(_ENDS[1], n - 1) / stats.norm.ppf(_ENDS[1])) if n > 1 else 0.0


class Resampler:
    """Draws of topics and seeds that depend on nothing but their names and numbers.

    Args:
        draws: how many, R.
        seed: seed of the draws.
    """

    def __init__(self, draws: int = 2000, seed: int = 0) -> None:
        self._draws, self._seed = draws, seed
        self._kept: dict[tuple[str, int], Array] = {}

    def counts(self, name: str, n: int) -> Array:
        """How often each of n is drawn, [R, n]; the same whenever the name and n are."""
        if (name, n) not in self._kept:
            draw = np.random.default_rng([self._seed, crc32(name.encode()), n])
            self._kept[name, n] = draw.multinomial(n, np.full(n, 1 / n), size=self._draws).astype(np.float64)
        return self._kept[name, n]

    def over_topics(self, sums: Array, counts: Array, suite: str) -> Estimates:
        """Mean over items.

        Args:
            sums: of the items of each topic, [K, T].
            counts: items of each topic, [T].
            suite: name of the suite, which the draw of topics belongs to.
        """
        drawn = self.counts(f"topics of {suite}", len(counts))
        value = sums.sum(-1) / counts.sum()
        means = (drawn @ sums.T) / (drawn @ counts)[:, None]
        return Estimates(value, _stretched(means, value, len(counts)))

    def over_seeds(self, values: Array, seeds: Array) -> Estimates:
        """Mean over seeds.

        Args:
            values: of each seed, [S, K].
            seeds: which they are, [S], sorted; whatever has the same seeds shares the draw.
        """
        drawn = self.counts(f"seeds {' '.join(f'{seed:g}' for seed in seeds)}", len(values))
        value = values.mean(0)
        return Estimates(value, _stretched(drawn @ values / len(values), value, len(values)))

    def over_both(self, sums: Array, counts: Array, suite: str, seeds: Array) -> Estimates:
        """Mean over seeds and items.

        Args:
            sums: of the items of each topic, by seed, [S, K, T].
            counts: items of each topic, [T].
            suite: name of the suite.
            seeds: which they are, [S], sorted.
        """
        topics = self.over_topics(sums.mean(0), counts, suite)
        runs = self.over_seeds(sums.sum(-1) / counts.sum(), seeds)
        return Estimates(topics.value, topics.draws + (runs.draws - topics.value))


def _stretched(means: Array, value: Array, n: int) -> Array:
    """Means of draws, [R, K], with their distance from the value [K] stretched."""
    return value + expansion(n) * (means - value)
