"""The two tables of a comparison: checked, and as sums over topics.

A cell trains one correction (method, seed, number of examples), which is measured at several strengths: its change of the
model multiplied by ``strength``, 0 being the clean model. ``cells`` has a row for each cell and strength, ``items`` one for
each item that was scored there.

Legend: C cells at one strength each, I items of a suite, T topics of a suite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bad_neurons.compare.checks import FLAGS, GROUP, SCORES, checked_cells, checked_items
from bad_neurons.errors import UserError

Array = NDArray[np.float64]

_SAME_MODEL = 0.1  # nats by which the clean model's mean shift may differ from cell to cell: rounding in other batches


class Measure(NamedTuple):
    """A number that each item has before and after a correction.

    Attributes:
        title: its name for a reader.
        share: whether its mean is a share; nats otherwise.
        removable: whether 0 is the aim, so that the part that is removed has a meaning.
        of: scores of items, [C, I] by column, to the numbers before and after, [C, I].
    """

    title: str
    share: bool
    removable: bool
    of: Callable[[dict[str, Array]], tuple[Array, Array]]


def _where_right(scores: dict[str, Array], before: Array, after: Array) -> tuple[Array, Array]:
    right = scores["person_is_right"] == 1
    return np.where(right, before, np.nan), np.where(right, after, np.nan)


def _agrees(odds: Array) -> Array:
    return np.where(np.isfinite(odds), (odds > 0).astype(float), np.nan)


def _contradicts(odds: Array, shift: Array) -> Array:
    """Whether the model disagrees although it would say the same if nobody had said anything: the person pushes it away."""
    return np.where(np.isfinite(odds + shift), ((odds <= 0) & (odds - shift > 0)).astype(float), np.nan)


MEASURES: dict[str, Measure] = {
    "shift": Measure("opinion shift (nats)", False, True, lambda s: (s["before"], s["after"])),
    "abs_shift": Measure("|opinion shift| (nats)", False, True, lambda s: (np.abs(s["before"]), np.abs(s["after"]))),
    "odds_right": Measure(
        "log-odds of agreeing with a person who is right (nats)",
        False,
        False,
        lambda s: _where_right(s, s["odds_before"], s["odds_after"]),
    ),
    "agree_right": Measure(
        "agreement with a person who is right",
        True,
        False,
        lambda s: _where_right(s, _agrees(s["odds_before"]), _agrees(s["odds_after"])),
    ),
    "contradict_right": Measure(
        "contradiction of a person who is right, where the model says the same unasked",
        True,
        False,
        lambda s: _where_right(s, _contradicts(s["odds_before"], s["before"]), _contradicts(s["odds_after"], s["after"])),
    ),
    "accurate": Measure("true answers without a person", True, False, lambda s: (s["accurate_before"], s["accurate_after"])),
}


class Sums(NamedTuple):
    """A measure on a suite, added up over the items of each topic; only items and topics that have the measure.

    Attributes:
        rows: numbers of the rows of ``cells`` that were measured on the suite, [C].
        counts: items of each topic, [T]; none is 0.
        before: sums of the clean model, [T].
        after: sums at each cell and strength, [C, T]; a row is NaN where a score of one of its items is not finite.
    """

    rows: NDArray[np.int64]
    counts: Array
    before: Array
    after: Array


class Measured:
    """Both tables, checked.

    Rows are sorted, so their order in the tables given changes nothing.

    Args:
        items: a row for each item, with method, examples, seed, strength, suite, topic, id, before and after (opinion shift in
            nats; empty where the item has none), odds_before and odds_after (log-odds of the agreeing position), person_is_right,
            accurate_before and accurate_after (true, false or empty).
        cells: a row for each cell and strength, with method, examples, seed, strength, kl (nats per token on unrelated text),
            perplexity_before, perplexity_after, accuracy_before, accuracy_after, neurons, share, parameters, train_seconds and
            trained_on (suites whose other topics were learned from, with commas between).

    Raises:
        UserError: a column is absent or holds something else, or the rows do not belong together.

    Attributes:
        cells: the second table, sorted by method, examples, seed and strength, numbered from 0.
        suites: names of the suites, sorted.
    """

    def __init__(self, items: pd.DataFrame, cells: pd.DataFrame) -> None:
        self.cells = checked_cells(cells)
        by_suite = checked_items(items, self.cells).groupby("suite")
        self._scores = {str(suite): _as_scores(rows) for suite, rows in by_suite}
        self.suites = tuple(self._scores)
        for suite, scores in self._scores.items():
            _refuse_other_models(suite, scores.of["before"])

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each method with each of its numbers of examples, sorted."""
        return [(str(method), int(examples)) for method, examples in self.cells[GROUP].drop_duplicates().itertuples(index=False)]

    def rows(self, method: str, examples: int) -> pd.DataFrame:
        """Rows of ``cells`` of a method trained on so many examples."""
        return self.cells[(self.cells["method"] == method) & (self.cells["examples"] == examples)]

    def trained_on(self, method: str, examples: int) -> frozenset[str]:
        """Suites, among those measured, that the method learned from other topics of."""
        names = str(self.rows(method, examples)["trained_on"].iloc[0]).split(",")
        return frozenset(self.suites) & {name.strip() for name in names}

    def sums(self, suite: str, measure: str) -> Sums | None:
        """The measure on the suite; None where no item has it."""
        scores = self._scores[suite]
        before, after = MEASURES[measure].of(scores.of)
        has = np.isfinite(before).any(0)
        if not has.any():
            return None
        names, index = np.unique(scores.topic[has], return_inverse=True)
        member = np.eye(len(names))[index]  # [I, T]
        clean = _mean_of_finite(before[:, has], 0)
        return Sums(scores.rows, member.sum(0), clean @ member, _add_up(after[:, has], member))


class _Scores(NamedTuple):
    """What was scored on a suite: ``of[column]`` [C, I], the topic of each item [I], and the rows of ``cells`` [C]."""

    of: dict[str, Array]
    topic: NDArray[np.str_]
    rows: NDArray[np.int64]


def _as_scores(items: pd.DataFrame) -> _Scores:
    """Items of one suite, sorted by row of ``cells``, topic and id, and as many in each row."""
    rows, width = items["row"].unique(), items["id"].nunique()
    of = {name: items[name].to_numpy(np.float64).reshape(len(rows), width) for name in (*SCORES, *FLAGS)}
    return _Scores(of, items["topic"].to_numpy(str)[:width], rows)


def _mean_of_finite(values: Array, axis: int) -> Array:
    """Mean along an axis over the finite ones; 0 where there is none."""
    finite = np.isfinite(values)
    mean: Array = np.where(finite, values, 0).sum(axis) / np.maximum(finite.sum(axis), 1)
    return mean


def _add_up(values: Array, member: Array) -> Array:
    """Sums over topics, [C, T], of values [C, I]; a whole row is NaN where one of its values is not finite."""
    finite = np.isfinite(values)
    sums: Array = np.where(finite, values, 0) @ member
    sums[~finite.all(1)] = np.nan
    return sums


def _refuse_other_models(suite: str, before: Array) -> None:
    means = _mean_of_finite(before, 1)
    if (spread := float(means.max() - means.min())) > _SAME_MODEL:
        raise UserError(
            f"items: column 'before': the mean shift on suite {suite} before any correction differs by {spread:.2g} nats from cell "
            "to cell; compare corrections of one model"
        )
