"""The tables of a comparison: what each method did at each strength, what it leaves at equal KL, and whether that beats the reference.

All are tidy: a row for each combination, a number and the ends of its 95 % interval (``_low``, ``_high``) in three columns, and
``note`` where a number is missing or says less than it seems to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bad_neurons.artifacts import written_aside
from bad_neurons.compare.checks import CELL_NUMBERS
from bad_neurons.compare.equal_kl import Group, difference_table, frontier_table, frontiers_of, joined, measure_columns, small
from bad_neurons.compare.measured import MEASURES, Measured, Sums
from bad_neurons.compare.resample import Resampler
from bad_neurons.errors import UserError

ALL = 0  # `examples` of cells that learn from everything there is
_FINE = 33  # KL levels of a curve


@dataclass(frozen=True)
class Tables:
    """Everything that is said of a comparison.

    Attributes:
        results: each method, number of examples, strength and suite: measures before and after, and side effects.
        frontier: each measure at equal KL.
        differences: each measure at equal KL, less that of the reference; no rows where nothing else was measured.
        curves: opinion shift at many more KL levels, of each method's largest number of examples; for plots.
        reference: the method that the others are compared with.
        levels: the KL levels, in nats per token, ascending.
        bound: the one among them that the summary is given at.
        largest: the largest number of examples of each method.
    """

    results: pd.DataFrame
    frontier: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    reference: str
    levels: tuple[float, ...]
    bound: float
    largest: Mapping[str, int]

    def write(self, folder: Path) -> None:
        """Write ``compare``, ``frontier`` and ``differences`` into a folder, each as Parquet and as CSV."""
        for name, table in (("compare", self.results), ("frontier", self.frontier), ("differences", self.differences)):
            with written_aside(folder / f"{name}.parquet") as aside:
                table.to_parquet(aside, index=False)
            with written_aside(folder / f"{name}.csv") as aside:
                table.to_csv(aside, index=False)


def make_tables(
    items: pd.DataFrame,
    cells: pd.DataFrame,
    reference: str = "random",
    levels: Sequence[float] = (0.002, 0.005, 0.01, 0.02),
    bound: float = 0.01,
    draws: int = 2000,
    seed: int = 0,
) -> Tables:
    """All tables of a comparison.

    Args:
        items: scores of items before and after each cell (see :class:`Measured`).
        cells: side effects of each cell.
        reference: the method that the others are compared with.
        levels: KL levels of the comparison, in nats per token.
        bound: KL level of the summary, in nats per token.
        draws: draws of topics and seeds for the intervals.
        seed: seed of the draws.

    Raises:
        UserError: a table, the reference or a level cannot be used; the message names the column or the option.
    """
    measured, draw = Measured(items, cells), Resampler(draws, seed)
    methods = sorted({method for method, _ in measured.groups})
    if reference not in methods:
        raise UserError(f"--reference {reference}: no such method; there are {', '.join(methods)}")
    for name, values in (("levels", levels), ("bound", (bound,))):
        if wrong := [value for value in values if not 0 < value < np.inf]:
            raise UserError(f"--{name} {wrong[0]}: expected nats per token above 0")
    levels = tuple(sorted({*levels, bound}))
    at_equal_kl, differences = [], []
    for measure in MEASURES:
        frontiers = frontiers_of(measured, measure, measured.groups, levels, draw)
        at_equal_kl.append(frontier_table(measured, measure, frontiers, levels))
        differences.append(difference_table(measured, measure, frontiers, levels, reference))
    largest = dict(sorted(measured.groups, key=lambda group: examples_order(group[1])))
    fine = _fine_levels(measured, list(largest.items()), levels)
    curves = frontier_table(measured, "shift", frontiers_of(measured, "shift", list(largest.items()), fine, draw), fine)
    return Tables(
        _results(measured, draw),
        pd.concat(at_equal_kl, ignore_index=True),
        pd.concat(differences, ignore_index=True),
        curves,
        reference,
        levels,
        bound,
        dict(sorted(largest.items())),
    )


def examples_order(examples: int) -> float:
    """What numbers of examples are sorted by: all of them come last."""
    return np.inf if examples == ALL else float(examples)


def examples_text(examples: int) -> str:
    """A number of examples for a reader."""
    return "all" if examples == ALL else f"{examples:,}"


def _fine_levels(measured: Measured, groups: Sequence[Group], levels: Sequence[float]) -> tuple[float, ...]:
    """KL levels for smooth curves, even in the root of KL, not far beyond the last level, and with the end of each method's own."""
    ends = [float(measured.rows(*group).groupby("seed")["kl"].max().min()) for group in groups]
    top = min(2 * max(levels), max((end for end in ends if np.isfinite(end)), default=0.0))
    even = np.linspace(0, np.sqrt(top), _FINE) ** 2
    return tuple(sorted({*even.tolist(), *(level for level in (*levels, *ends) if level <= top)}))


def _results(measured: Measured, draw: Resampler) -> pd.DataFrame:
    """A row for each method, number of examples, strength and suite."""
    sums = {suite: {m: found for m in MEASURES if (found := measured.sums(suite, m)) is not None} for suite in measured.suites}
    blocks = []
    for method, examples in measured.groups:
        trained = measured.trained_on(method, examples)
        for rows in _with_the_same_seeds(measured.rows(method, examples)):
            key = {"method": method, "examples": examples, "strength": rows["strength"].unique()}
            effects = _effects(rows, draw)
            for suite, by_measure in sums.items():
                if columns := _suite_columns(by_measure, rows, suite, draw):
                    blocks.append(pd.DataFrame({**key, "suite": suite, "trained": suite in trained, **columns, **effects}))
    return pd.concat(blocks).sort_values(["method", "examples", "strength", "suite"], ignore_index=True)


def _with_the_same_seeds(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows of a method in tables that have the same seeds at each of their strengths, sorted by strength and seed."""
    rows = rows.sort_values(["strength", "seed"])
    seeds = rows.groupby("strength")["seed"].agg(tuple)
    return [part for _, part in rows.groupby(rows["strength"].map(seeds))]


def _suite_columns(by_measure: Mapping[str, Sums], rows: pd.DataFrame, suite: str, draw: Resampler) -> dict[str, Any]:
    """Every measure of a suite before and after, at each of K strengths; empty where it was not measured there."""
    columns: dict[str, Any] = {}
    counts: dict[str, Any] = {"items": 0, "topics": 0, "seeds": 0}
    k = rows["strength"].nunique()
    lost = np.zeros(k, bool)
    for measure, sums in by_measure.items():
        number = pd.Series(np.arange(len(sums.rows)), sums.rows).reindex(rows.index)
        if number.isna().all():
            return {}
        after_sums = np.full((len(rows), len(sums.counts)), np.nan)
        after_sums[number.notna()] = sums.after[number.dropna().astype(int)]
        topics, seeds = len(sums.counts), len(rows) // k
        before = draw.over_topics(sums.before[None], sums.counts, suite)
        after = draw.over_both(after_sums.reshape(k, seeds, topics).swapaxes(0, 1), sums.counts, suite, rows["seed"].unique())
        columns |= measure_columns(measure, before, after, topics, seeds, f"{measure}_")
        lost |= ~np.isfinite(after.value)
        counts = max(counts, {"items": int(sums.counts.sum()), "topics": topics, "seeds": seeds}, key=lambda c: int(c["items"]))
    notes = [joined(small(counts["topics"], counts["seeds"]), "not measured, or scores that are not finite" if no else "") for no in lost]
    return {**counts, **columns, "note": notes}


def _effects(rows: pd.DataFrame, draw: Resampler) -> dict[str, Any]:
    """Side effects and costs at each strength: means over seeds, with intervals for what may differ between them."""
    by_seed = {name: values.reshape(rows["strength"].nunique(), -1).T for name in CELL_NUMBERS for values in (rows[name].to_numpy(),)}
    columns: dict[str, Any] = {}
    for name in ("kl", "perplexity_after", "accuracy_after"):
        columns |= draw.over_seeds(by_seed.pop(name), rows["seed"].unique()).columns(name, rows["seed"].nunique() > 1)
    return columns | {name: values.mean(0) for name, values in by_seed.items()}
