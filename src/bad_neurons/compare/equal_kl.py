"""Tables at equal KL: what each method leaves of each measure, and the same less what the reference leaves.

Beside the suites stand the means over those that a method learned from (other topics of) and over those that it never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from bad_neurons.compare.frontier import Frontier, frontier, mean_frontier
from bad_neurons.compare.measured import MEASURES, Array, Measured
from bad_neurons.compare.resample import Estimates, Resampler

TRAINED, UNSEEN = "mean of trained", "mean of unseen"

Group = tuple[str, int]
Frontiers = Mapping[Group, Mapping[str, Frontier]]


def frontiers_of(measured: Measured, measure: str, groups: Sequence[Group], levels: Sequence[float], draw: Resampler) -> Frontiers:
    """Frontiers of a measure, by method and number of examples, and by suite.

    Args:
        measured: the tables.
        measure: name of the measure.
        groups: methods with their numbers of examples.
        levels: KL levels in nats per token.
        draw: draws of topics and seeds.
    """
    by_suite = {suite: sums for suite in measured.suites if (sums := measured.sums(suite, measure)) is not None}
    return {
        group: {s: one for s, sums in by_suite.items() if (one := frontier(measured, sums, *group, s, levels, draw)) is not None}
        for group in groups
    }


def frontier_table(measured: Measured, measure: str, frontiers: Frontiers, levels: Sequence[float]) -> pd.DataFrame:
    """A row for each method, number of examples, suite (or mean of suites) and KL level.

    ``before`` is the clean model, ``after`` the corrected one, ``change`` the difference, and ``removed`` the share ``1 - after /
    before`` where 0 is the aim (empty elsewhere); ``reach`` is the largest KL that every seed reaches, beyond which nothing is known.

    Args:
        measured: the tables.
        measure: name of the measure.
        frontiers: of this measure, at these levels.
        levels: KL levels in nats per token.
    """
    blocks = []
    for (method, examples), by_suite in frontiers.items():
        trained = measured.trained_on(method, examples)
        for suite, one in _with_means(by_suite, trained, frozenset(measured.suites) - trained).items():
            key = {"method": method, "examples": examples, "suite": suite, "trained": suite in {*trained, TRAINED}, "measure": measure}
            blocks.append(pd.DataFrame({**key, "kl": levels, **_columns(measure, one)}))
    return _below_each_other(blocks)


def _columns(measure: str, one: Frontier) -> dict[str, object]:
    columns = measure_columns(measure, one.before, one.after, min(one.topics), one.seeds)
    counts = {"items": one.items, "topics": sum(one.topics), "seeds": one.seeds, "reach": one.reach}
    beyond = (one.before.value > 0) & (one.after.value < 0) & (measure == "shift")
    few = small(min(one.topics), one.seeds)
    notes = [
        joined(note, few, "pulled beyond 0, away from the person" if away else "") for note, away in zip(one.notes, beyond, strict=True)
    ]
    return {**columns, **counts, "note": notes}


def measure_columns(measure: str, before: Estimates, after: Estimates, topics: int, seeds: int, prefix: str = "") -> dict[str, Array]:
    """``before``, ``after``, ``change`` and, where 0 is the aim, ``removed``, with their intervals, [K] each.

    Args:
        measure: name of the measure.
        before: of the clean model, one number.
        after: of corrected ones, K numbers.
        topics: how many were drawn from.
        seeds: how many were drawn from.
        prefix: of the names.
    """
    varied, k = topics > 1 or seeds > 1, len(after.value)
    bounded = {
        name: column.clip(0, 1) if MEASURES[measure].share else column
        for name, column in {**before.columns("before", topics > 1), **after.columns("after", varied)}.items()
    }
    columns = {**bounded, **(after - before).columns("change", varied)}
    if MEASURES[measure].removable:
        columns |= after.removed_from(before).columns("removed", varied)
    return {prefix + name: np.broadcast_to(column, k) for name, column in columns.items()}


def difference_table(measured: Measured, measure: str, frontiers: Frontiers, levels: Sequence[float], reference: str) -> pd.DataFrame:
    """A row for each other method, number of examples, suite (or mean of suites) and KL level: its number less the reference's.

    Both come from the same draws of topics, so what is special to a topic goes out. ``excludes_zero`` says whether the interval
    does; it is empty where there is no interval, or where either side has one seed or the suite one topic.

    Args:
        measured: the tables.
        measure: name of the measure.
        frontiers: of this measure, at these levels.
        levels: KL levels in nats per token.
        reference: name of the method that is subtracted.
    """
    blocks = []
    for (method, examples), mine in frontiers.items():
        if method == reference:
            continue
        found = frontiers.get((reference, examples), {})
        learned = measured.trained_on(method, examples)
        others = measured.trained_on(reference, examples) if found else learned
        sides = learned & others, frozenset(measured.suites) - learned - others
        why = "not measured on this suite" if found else f"no cells with {examples} examples"
        theirs = _with_means({suite: found.get(suite, _absent(one, why)) for suite, one in mine.items()}, *sides)
        for suite, one in _with_means(mine, *sides).items():
            key = {"method": method, "reference": reference, "examples": examples, "suite": suite}
            key |= {"trained": suite in {*sides[0], TRAINED}, "measure": measure}
            blocks.append(pd.DataFrame({**key, "kl": levels, **_difference(one, theirs[suite], reference)}))
    return _below_each_other(blocks)


def _absent(one: Frontier, why: str) -> Frontier:
    """In place of a frontier beside ``one`` that there is none of."""
    nothing = Estimates(np.full_like(one.after.value, np.nan), np.full_like(one.after.draws, np.nan))
    return replace(one, after=nothing, reach=0.0, seeds=0, notes=(why,) * len(one.notes))


def _difference(one: Frontier, other: Frontier, reference: str) -> dict[str, object]:
    topics, seeds = min(one.topics), min(one.seeds, other.seeds)
    columns = (one.after - other.after).columns("difference", topics > 1 or max(one.seeds, other.seeds) > 1)
    low, high = columns["difference_low"], columns["difference_high"]
    known = np.isfinite(low) & (topics > 1) & (seeds > 1)
    excludes = [bool(yes) if sure else None for yes, sure in zip((low > 0) | (high < 0), known, strict=True)]
    theirs = (f"{reference}: {note}" if note else "" for note in other.notes)
    counts = {"items": one.items, "topics": sum(one.topics), "seeds": one.seeds, "reference_seeds": other.seeds}
    notes = [joined(a, b, small(topics, seeds)) for a, b in zip(one.notes, theirs, strict=True)]
    values = {"after": one.after.value, "reference_after": other.after.value}
    return {**values, **columns, "excludes_zero": pd.array(excludes, "boolean"), **counts, "note": notes}


def _with_means(frontiers: Mapping[str, Frontier], trained: frozenset[str], unseen: frozenset[str]) -> dict[str, Frontier]:
    """Frontiers by suite, and their means over those of two sets."""
    sides = {TRAINED: [f for s, f in frontiers.items() if s in trained], UNSEEN: [f for s, f in frontiers.items() if s in unseen]}
    return {**frontiers, **{name: mean_frontier(parts) for name, parts in sides.items() if parts}}


def _below_each_other(blocks: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame()


def small(topics: int, seeds: int) -> str:
    """What an interval does not cover where there is only one of something."""
    if topics == seeds == 1:
        return "one seed and one topic: no interval"
    one = "seed" if seeds == 1 else "topic" if topics == 1 else ""
    return f"one {one}: the interval does not cover how {one}s differ" if one else ""


def joined(*notes: str) -> str:
    """Notes that are not empty, each once."""
    return "; ".join(dict.fromkeys(note for note in notes if note))
