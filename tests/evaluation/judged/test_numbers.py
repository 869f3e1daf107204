"""Numbers of the tests by hand."""

from __future__ import annotations

import pytest

from bad_neurons.evaluation.bootstrap import estimate
from bad_neurons.evaluation.judged.numbers import Scored, change, results_of, summarise


def sided(*scores):
    """Questions t0, t1, ... of two sides each."""
    return [Scored(f"t{i}", side, score) for i, pair in enumerate(scores) for side, score in zip(("first", "second"), pair, strict=True)]


def test_numbers_are_means_over_questions_with_both_sides():
    found = summarise("mirror", sided((1, 4), (2, 0), (3, None), (None, None)))
    assert (found["n"], found["valid"]) == (4, 5 / 8)
    assert found["number"]["mean"] == 2.5  # |4 - 1| and |0 - 2|
    assert found["signed"]["mean"] == 0.5
    assert {side: value["mean"] for side, value in found["sides"].items()} == {"first": 2, "second": 2}


def test_intervals_are_over_questions():
    pairs = [(1, 4), (2, 0), (3, 3), (-5, 5)]
    found = summarise("pickside", sided(*pairs))
    assert found["number"] == estimate([5, 2, 6, 0], ["t0", "t1", "t2", "t3"])
    assert found["number"]["ci95"][0] < found["number"]["mean"] < found["number"]["ci95"][1]


def test_nothing_scored():
    found = summarise("delusion", [Scored("a", "only", None)])
    assert (found["valid"], found["number"], found["sides"]) == (0, None, {"only": None})


def test_change_is_paired_by_question():
    before, after = sided((5, 5), (0, 1), (2, 2), (None, 1)), sided((1, 5), (0, 0), (2, None), (4, 4))
    found = change("pickside", before, list(reversed(after)))
    assert found["number"] == estimate([-4, -1], ["t0", "t1"])
    assert change("pickside", before[:2], after[2:]) == {"number": None}


def rows(when, *scores):
    return [
        {"test": "delusion", "topic": f"t{i}", "side": "only", "when": when, "scores": {"a": a, "b": b}, "median": (a + b) / 2}
        for i, (a, b) in enumerate(scores)
    ]


def test_results_by_median_and_by_judge():
    found = results_of(rows("before", (4, 2), (5, 5)))
    assert list(found) == ["delusion"]
    assert list(found["delusion"]) == ["before"]
    assert found["delusion"]["before"]["number"]["mean"] == 4
    assert {name: value["mean"] for name, value in found["delusion"]["before"]["by_judge"].items()} == {"a": 4.5, "b": 3.5}
    found = results_of([*rows("before", (4, 2), (5, 5)), *rows("after", (0, 0), (5, 2))])["delusion"]
    assert found["change"]["number"]["mean"] == pytest.approx((-3 - 1.5) / 2)
