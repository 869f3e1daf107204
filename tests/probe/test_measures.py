"""Measures and their draws against slow ones that put the drawn answers into a list."""

from __future__ import annotations

import numpy as np
import pytest

from bad_neurons.evaluation.bootstrap import draw_topics, estimate
from bad_neurons.probe.measures import Measured, Measures, mean_of, topic_counts

RNG = np.random.default_rng(4)
TOPICS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4])
Y = np.array([1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1], dtype=bool)
LOGITS = np.round(RNG.normal(size=14) + Y, 1)  # some tie
LOGITS[:3] = 0.4


def auroc(logits, y):
    """All pairs, one by one."""
    pairs = [(p, n) for p in logits[y] for n in logits[~y]]
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)


def drawn(topics=TOPICS, count=5):
    """Numbers of the answers in each draw."""
    return [np.concatenate([np.flatnonzero(topics == t) for t in draw]) for draw in draw_topics(count)]


def test_draws_are_counted():
    counts = topic_counts(5)
    assert counts.shape == (2000, 5)
    assert (counts.sum(1) == 5).all()
    assert counts[7].tolist() == [int((draw_topics(5)[7] == t).sum()) for t in range(5)]


def test_accuracy_is_the_estimate_of_the_package():
    found = Measures(Y, TOPICS, topic_counts(5)).accuracy(LOGITS).estimate()
    expected = estimate(((LOGITS > 0) == Y).astype(float), [f"topic {t}" for t in TOPICS])
    assert found == {"mean": pytest.approx(expected["mean"]), "ci95": pytest.approx(expected["ci95"])}
    assert found["ci95"][0] < found["mean"] < found["ci95"][1]


def test_auroc_and_its_draws_by_all_pairs():
    found = Measures(Y, TOPICS, topic_counts(5)).auroc(LOGITS)
    assert found.value == pytest.approx(auroc(LOGITS, Y))
    for number in (0, 1, 500, 1999):
        rows = drawn()[number]
        assert found.draws[number] == pytest.approx(auroc(LOGITS[rows], Y[rows])), number
    assert 0.1 < found.draws.std() < 0.5


def test_draws_of_one_label_have_no_auroc_and_are_left_out():
    topics, y = np.array([0, 0, 1, 1]), np.array([True, True, False, False])
    found = Measures(y, topics, topic_counts(2)).auroc(np.array([0.1, 0.3, 0.2, 0.0]))
    both = np.array([len(set(draw)) == 2 for draw in draw_topics(2)])
    assert (np.isfinite(found.draws) == both).all()
    assert found.estimate() == {"mean": 0.75, "ci95": [0.75, 0.75]}


def test_one_topic_says_nothing_about_others():
    found = Measures(Y, np.zeros(14, dtype=int), topic_counts(1))
    for measured in (found.accuracy(LOGITS), found.auroc(LOGITS)):
        assert measured.estimate()["ci95"] == pytest.approx([measured.value] * 2)


def test_a_difference_is_paired():
    measures = Measures(Y, TOPICS, topic_counts(5))
    one, other = measures.auroc(LOGITS), measures.auroc(LOGITS - 0.8 * Y)
    difference = one.minus(other)
    assert difference.value == pytest.approx(one.value - other.value)
    rows = drawn()[11]
    assert difference.draws[11] == pytest.approx(auroc(LOGITS[rows], Y[rows]) - auroc((LOGITS - 0.8 * Y)[rows], Y[rows]))
    low, high = difference.estimate()["ci95"]
    apart = [e["ci95"] for e in (one.estimate(), other.estimate())]
    assert high - low < apart[0][1] - apart[1][0]  # narrower than that of two that are not paired
    same = one.minus(one).estimate()
    assert same == {"mean": 0.0, "ci95": [0.0, 0.0]}


def test_mean_over_divisions_goes_draw_by_draw():
    one, other = Measured(0.5, np.array([0.0, 1.0, np.nan])), Measured(1.0, np.array([1.0, 0.5, 0.5]))
    found = mean_of([one, other])
    assert found.value == 0.75
    np.testing.assert_array_equal(found.draws, [0.5, 0.75, np.nan])
    assert found.estimate()["ci95"] == pytest.approx([0.50625, 0.74375])


def test_no_draw_has_it_and_the_value_stands_alone():
    assert Measured(0.5, np.full(3, np.nan)).estimate() == {"mean": 0.5, "ci95": [0.5, 0.5]}
