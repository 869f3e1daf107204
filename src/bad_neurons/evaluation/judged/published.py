"""Published answers with the scores of Syco-Bench's three judges: what other judges are compared with."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from bad_neurons.artifacts import PathLike
from bad_neurons.data.readers.files import Wanted, blamed_on, read_csv
from bad_neurons.data.readers.syco_bench import COLUMNS
from bad_neurons.evaluation.judged.tests import TESTS, Item, Row, TestName, items_of

JUDGES = 3

# Columns of each side: the answer, the judges' scores (one column with a list, or one a judge), their median.
_COLUMNS: dict[TestName, dict[str, tuple[str, tuple[str, ...], str]]] = {
    "pickside": {"first": ("response1", ("judge1_scores",), "score1"), "second": ("response2", ("judge2_scores",), "score2")},
    "mirror": {"first": ("response1", ("judge1_scores",), "score1"), "second": ("response2", ("judge2_scores",), "score2")},
    "whosaid": {
        "self": ("response_self", ("judge_scores_self",), "score_self"),
        "friend": ("response_friend", ("judge_scores_friend",), "score_friend"),
    },
    "delusion": {"only": ("response", ("judge1_score", "judge2_score", "judge3_score"), "median_score")},
}


class PublishedAnswer(NamedTuple):
    """One published answer.

    Attributes:
        model: the model that gave it.
        item: what it was asked.
        answer: what it said.
        scores: of the three judges, None where one gave none.
        median: the published median.
    """

    model: str
    item: Item
    answer: str
    scores: tuple[float | None, ...]
    median: float

    @property
    def topic(self) -> str:
        """Its question."""
        return self.item.topic


def read_published(test: TestName, where: PathLike = "") -> list[PublishedAnswer]:
    """All published answers to a test, from ``<test>.csv`` in a folder, or below ``BAD_NEURONS_DATA`` without one.

    Raises:
        UserError: a file that is not there, a column or a cell missing, or a score that is none.
    """
    wanted = Wanted(f"{test}.csv", "syco-bench/judged", os.fspath(where))
    path = wanted.find()
    if path is None:
        raise wanted.absent("it is to be had from github.com/timfduffy/syco-bench alone")
    sides = _COLUMNS[test]
    names = ["Name", *COLUMNS[test], *dict.fromkeys(c for answer, scores, median in sides.values() for c in (answer, *scores, median))]
    found: list[PublishedAnswer] = []
    for line, row in read_csv(path, names):
        with blamed_on(path, line):
            found += [_answer(item, row) for item in items_of(test, [row])]
    return found


def _answer(item: Item, row: Row) -> PublishedAnswer:
    answer, columns, median = _COLUMNS[item.test][item.side]
    cells = [cell for column in columns for cell in row[column].strip("[]").split(",")]
    scores = tuple(None if cell.strip() in ("None", "nan") else _score(item.test, cell) for cell in cells)
    if len(scores) != JUDGES:
        raise ValueError(f"`{columns[0]}` holds {len(scores)} scores; expected {JUDGES}")
    kept = {name: row[name] for name in COLUMNS[item.test]}
    return PublishedAnswer(row["Name"], item._replace(row=kept), row[answer], scores, _score(item.test, row[median]))


def _score(test: TestName, cell: str) -> float:
    low, high = TESTS[test].low, TESTS[test].high
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise ValueError(f"{cell.strip()!r} is no score; expected a number from {low} to {high}")
    return score
