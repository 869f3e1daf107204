"""From scores of answers to the numbers of a test, with intervals over questions. Tests are never averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bad_neurons.evaluation.bootstrap import Estimate, estimate
from bad_neurons.evaluation.judged.tests import TESTS, TestName


class Scored(NamedTuple):
    """One judged answer.

    Attributes:
        topic: its question.
        side: its side of the question.
        score: what the judges gave, or None where none gave a score.
    """

    topic: str
    side: str
    score: float | None


def results_of(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of each test by the judges' median, ``before`` and ``after`` where there is one, and the ``change``.

    ``by_judge`` has the test's number by each judge alone.

    Args:
        judged: one row an answer, with ``test``, ``topic``, ``side``, ``when``, ``scores`` by judge, and their ``median``.
    """
    results: dict[str, Any] = {}
    for test in dict.fromkeys(row["test"] for row in judged):
        sides = {w: [row for row in judged if (row["test"], row["when"]) == (test, w)] for w in ("before", "after")}
        results[test] = {when: _side(test, rows) for when, rows in sides.items() if rows}
        if sides["after"]:
            results[test]["change"] = change(test, *([_scored(row, row["median"]) for row in rows] for rows in sides.values()))
    return results


def _side(test: TestName, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_judge = {name: summarise(test, [_scored(row, row["scores"][name]) for row in rows])["number"] for name in rows[0]["scores"]}
    return {**summarise(test, [_scored(row, row["median"]) for row in rows]), "by_judge": by_judge}


def _scored(row: Mapping[str, Any], score: float | None) -> Scored:
    return Scored(row["topic"], row["side"], score)


def summarise(test: TestName, scored: Sequence[Scored]) -> dict[str, Any]:
    """The numbers of a test of one model.

    ``n`` questions, ``valid`` share of answers that have a score, the test's numbers over questions whose sides all have one
    (None where there is none), and the mean score of each side.
    """
    sides = {side: [s for s in scored if s.side == side and s.score is not None] for side in TESTS[test].sides}
    questions = _questions(test, scored)
    return {
        "n": len({s.topic for s in scored}),
        "valid": sum(s.score is not None for s in scored) / len(scored),
        **{name: _estimate(list(questions), values) for name, values in _values(test, questions).items()},
        "sides": {side: _estimate([s.topic for s in kept], [float(s.score or 0) for s in kept]) for side, kept in sides.items()},
    }


def change(test: TestName, before: Sequence[Scored], after: Sequence[Scored]) -> dict[str, Estimate | None]:
    """How the numbers of a test changed, question by question, over those that have a number on both occasions."""
    then, now = _questions(test, before), _questions(test, after)
    both = [topic for topic in then if topic in now]
    first, second = (_values(test, {topic: kept[topic] for topic in both}) for kept in (then, now))
    return {name: _estimate(both, [b - a for a, b in zip(first[name], second[name], strict=True)]) for name in first}


def _questions(test: TestName, scored: Sequence[Scored]) -> dict[str, list[float]]:
    """Scores of the sides, in the test's order, of every question whose sides all have one."""
    found: dict[str, dict[str, float]] = {}
    for one in scored:
        if one.score is not None:
            found.setdefault(one.topic, {})[one.side] = one.score
    sides = TESTS[test].sides
    return {topic: [scores[side] for side in sides] for topic, scores in found.items() if len(scores) == len(sides)}


def _values(test: TestName, questions: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [number(scores) for scores in questions.values()] for name, number in TESTS[test].numbers.items()}


def _estimate(topics: Sequence[str], values: Sequence[float]) -> Estimate | None:
    return estimate(values, topics) if values else None
