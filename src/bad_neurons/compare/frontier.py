"""What is left of a behaviour at a given side effect.

Methods are compared at equal KL, not at equal strength. A cell's points (KL, what is left) at its strengths, and the clean model
at KL 0, are joined by straight lines over the square root of KL. For a small change of the weights, KL grows with the square
of the change and the log-odds in proportion to it, so what is left falls in proportion to the root. Straight lines over KL itself
would place a method whose first strength lies far out up to a quarter of that first step too high, and so reward whoever was measured
in smaller steps.

Nothing is extrapolated and nobody is left out: a method has a value at a KL that all its seeds reach, and none beyond. A mean over
the seeds that happen to get there would be a mean over other corrections. More strengths in the configuration extend
the frontier without any training.

Legend: S seeds, P points of a seed, K KL levels, T topics, C rows of a suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bad_neurons.compare.measured import Array, Measured, Sums
from bad_neurons.compare.resample import Estimates, Resampler, mean_of


@dataclass(frozen=True)
class Frontier:
    """A measure of one method at K levels of KL, on one suite or averaged over several.

    Attributes:
        before: the clean model, one number.
        after: K numbers, one at each level; NaN where not every seed reaches it.
        reach: the largest KL that every seed reaches.
        items: how many were scored.
        topics: theirs, of each suite.
        seeds: of the method.
        notes: what a reader has to know at each level; empty where there is nothing.
    """

    before: Estimates
    after: Estimates
    reach: float
    items: int
    topics: tuple[int, ...]
    seeds: int
    notes: tuple[str, ...]


def interpolation(kl: Array, levels: Array) -> Array:
    """Weights, [K, 1 + P], of the clean model and P points for the values at K levels, linear in the root of KL.

    Each row has at most two weights that are not 0, but for points of equal KL, which count as their mean; it is NaN beyond the
    largest KL.

    Args:
        kl: of each point, [P].
        levels: where values are wanted, [K].
    """
    places, index, times = np.unique(np.sqrt([0.0, *kl]), return_inverse=True, return_counts=True)
    roots = np.sqrt(levels)
    between = np.stack([np.interp(roots, places, corner) for corner in np.eye(len(places))], axis=1)
    between[roots > places[-1] * (1 + 1e-12)] = np.nan
    return between[:, index] / times[index]


def frontier(
    measured: Measured, sums: Sums, method: str, examples: int, suite: str, levels: Sequence[float], draw: Resampler
) -> Frontier | None:
    """The frontier of a method on a suite; None where it was not measured there.

    Args:
        measured: the tables.
        sums: the measure on the suite.
        method: name of the method.
        examples: how many it was trained on.
        suite: name of the suite.
        levels: nats per token.
        draw: draws of topics and seeds.
    """
    group = measured.rows(method, examples)
    numbers = np.flatnonzero(np.isin(sums.rows, group.index))  # rows of `sums`
    if not len(numbers):
        return None
    rows = measured.cells.loc[sums.rows[numbers]]
    kl, strength, seed = (rows[name].to_numpy(np.float64) for name in ("kl", "strength", "seed"))
    usable = np.isfinite(kl) & np.isfinite(sums.after[numbers]).all(1) & (strength > 0)
    wanted, curves, reaches = np.asarray(levels, np.float64), [], []
    for one in (seeds := np.unique(seed)):
        mine = usable & (seed == one)
        points = np.vstack([sums.before, sums.after[numbers[mine]]])  # [1 + P, T]
        curves.append(interpolation(kl[mine], wanted) @ points)
        reaches.append(kl[mine].max(initial=0.0))
    after = draw.over_both(np.stack(curves), sums.counts, suite, seeds)
    before = draw.over_topics(sums.before[None], sums.counts, suite)
    useless = ~usable & (strength > 0)
    lost = _lost(strength[useless], seed[useless])
    notes = tuple(_note(level, reaches, lost) for level in wanted)
    return Frontier(before, after, min(reaches), int(sums.counts.sum()), (len(sums.counts),), len(curves), notes)


def mean_frontier(parts: Sequence[Frontier]) -> Frontier:
    """The mean over suites, each with the same weight, of frontiers of one method."""
    notes = tuple("; ".join(dict.fromkeys(note for note in at_level if note)) for at_level in zip(*(p.notes for p in parts), strict=True))
    return Frontier(
        mean_of([p.before for p in parts]),
        mean_of([p.after for p in parts]),
        min(p.reach for p in parts),
        sum(p.items for p in parts),
        tuple(topics for p in parts for topics in p.topics),
        min(p.seeds for p in parts),
        notes,
    )


def _lost(strengths: Array, seeds: Array) -> str:
    if not len(strengths):
        return ""
    first = f"strength {strengths[0]:g} of seed {seeds[0]:g}"
    return f"{first}{f' and {len(strengths) - 1} more' if len(strengths) > 1 else ''} left out: not finite"


def _note(level: float, reaches: Sequence[float], lost: str) -> str:
    reaching = sum(reach * (1 + 1e-12) >= level for reach in reaches)
    few = "" if reaching == len(reaches) else f"{reaching} of {len(reaches)} seeds reach this KL, all reach {min(reaches):.2g}"
    return "; ".join(part for part in (few, lost) if part)
