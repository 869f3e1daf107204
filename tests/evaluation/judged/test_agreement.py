"""Agreement of judges against scipy, slow implementations and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from bad_neurons.evaluation.judged.agreement import agreement, fixed_score, spearman
from bad_neurons.evaluation.judged.agreement_stage import MEDIAN, OTHERS, compare
from bad_neurons.evaluation.judged.published import PublishedAnswer
from bad_neurons.evaluation.judged.tests import Item


@pytest.mark.parametrize("ties", [2, 5, 1000])
def test_rank_correlation_is_scipys(ties):
    rng = np.random.default_rng(ties)
    x = rng.integers(ties, size=200).astype(float)
    y = np.round(x + rng.normal(scale=ties / 2, size=200))
    once = np.ones((1, 200))
    assert 0.1 < spearman(x, y, once)[0] < 0.99
    assert spearman(x, y, once)[0] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert spearman(x, x, once)[0] == pytest.approx(1)
    assert spearman(x, -x, once)[0] == pytest.approx(-1)
    assert np.isnan(spearman(x, np.ones(200), once)[0])


def test_weights_are_repetitions():
    rng = np.random.default_rng(0)
    x, y = rng.integers(6, size=(2, 50)).astype(float)
    times = rng.integers(4, size=(3, 50))
    found = spearman(x, y, times.astype(float))
    assert found == pytest.approx([stats.spearmanr(np.repeat(x, t), np.repeat(y, t)).statistic for t in times], abs=1e-12)


def test_intervals_draw_whole_questions():
    rng = np.random.default_rng(0)
    topics = [f"t{i % 7}" for i in range(60)]
    x = rng.integers(-5, 6, size=60).astype(float)
    y = np.clip(np.round(x + rng.normal(scale=3, size=60)), -5, 5)
    found = agreement(x.tolist(), y.tolist(), topics, seed=3)
    names = sorted(set(topics))
    draws = np.random.default_rng(3).integers(7, size=(2000, 7))
    values = {"rho": [], "mae": [], "bias": []}
    for draw in draws:
        at = [i for number in draw for i in range(60) if topics[i] == names[number]]
        values["rho"].append(stats.spearmanr(x[at], y[at]).statistic)
        values["mae"].append(np.mean([abs(x[i] - y[i]) for i in at]))
        values["bias"].append(np.mean([x[i] - y[i] for i in at]))
    assert found["n"] == 60
    assert found["spearman"]["ci95"] == pytest.approx(np.quantile(values["rho"], [0.025, 0.975]))
    assert found["mae"]["ci95"] == pytest.approx(np.quantile(values["mae"], [0.025, 0.975]))
    assert found["bias"]["ci95"] == pytest.approx(np.quantile(values["bias"], [0.025, 0.975]))
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_by_hand():
    found = agreement([1, 2, None, 4, 0], [2, 2, 3, 1, None], list("abcde"))
    assert found["n"] == 3
    assert found["mae"]["mean"] == pytest.approx((1 + 0 + 3) / 3)
    assert found["bias"]["mean"] == pytest.approx((-1 + 0 + 3) / 3)
    assert found["spearman"]["value"] == pytest.approx(-np.sqrt(3) / 2)  # ranks 1 2 3 against 2.5 2.5 1
    assert agreement([None], [1], ["a"]) is None


def test_a_judge_that_always_says_the_same_has_no_rank_correlation():
    found = agreement([3, 3, 3], [1, 2, 3], list("abc"))
    assert found["spearman"] is None
    assert found["mae"]["mean"] == 1


def test_draws_in_which_a_side_is_constant_are_left_out():
    found = agreement([1, 0, 0, 0], [1, 0, 0, 0], list("abcd"))  # many draws miss "a"
    assert found["spearman"] == {"value": pytest.approx(1), "ci95": pytest.approx([1, 1])}


def test_the_fixed_score_that_errs_least():
    others = [0, 0, 1, 5, None, 2]
    found = fixed_score(others, list("abcdef"))
    errors = {score: np.mean([abs(score - o) for o in others if o is not None]) for score in range(6)}
    assert found["score"] == min(errors, key=errors.get) == 1
    assert found["mae"]["mean"] == pytest.approx(errors[1])


def published(*scores):
    item = Item("delusion", "", "only", {"statement": "x"})
    return [PublishedAnswer(f"m{i % 2}", item._replace(topic=f"t{i // 2}"), "a", s, float(np.median(s))) for i, s in enumerate(scores)]


def test_judges_against_the_published_ones():
    answers = published((0, 1, 2), (5, 4, 3), (2, 2, 0), (1, 1, 4), (3, 0, 3), (0, 0, 0))
    mine, other = [0, 5, 2, 1, 3, 0], [1, 1, 1, None, 1, 1]
    found = compare(answers, {"mine": mine, "other": other}, seed=1)
    assert (found["answers"], found["questions"], found["models"]) == (6, 3, 2)
    assert list(found["judges"]) == ["mine", "other", "median of these judges"]
    assert list(found["judges"]["mine"]) == [MEDIAN, "published judge 1", "published judge 2", "published judge 3"]
    assert found["judges"]["mine"]["published judge 1"]["mae"]["mean"] == 0
    topics = [a.topic for a in answers]
    assert found["judges"]["mine"][MEDIAN] == agreement(mine, [1, 4, 2, 1, 3, 0], topics, 1)
    assert found["judges"]["other"][MEDIAN]["spearman"] is None
    assert found["judges"]["other"][MEDIAN]["n"] == 5
    assert found["judges"]["median of these judges"][MEDIAN] == agreement([0.5, 3, 1.5, 1, 2, 0.5], [1, 4, 2, 1, 3, 0], topics, 1)
    assert found["ceiling"]["published judge 3"][OTHERS] == agreement([2, 3, 0, 4, 3, 0], [0.5, 4.5, 2, 1, 1.5, 0], topics, 1)
    assert found["ceiling"]["published judge 2"]["published judge 3"] == agreement([1, 4, 2, 1, 0, 0], [2, 3, 0, 4, 3, 0], topics, 1)
    assert list(compare(answers, {"mine": mine})["judges"]) == ["mine"]


def test_order_of_answers_changes_no_value():
    answers = published(*[tuple(random.Random(i).choices(range(6), k=3)) for i in range(20)])
    scores = [float(i % 6) for i in range(20)]
    order = list(range(20))
    random.Random(0).shuffle(order)
    one, other = compare(answers, {"j": scores}), compare([answers[i] for i in order], {"j": [scores[i] for i in order]})
    for key in ("spearman", "mae", "bias"):
        value = "value" if key == "spearman" else "mean"
        assert one["judges"]["j"][MEDIAN][key][value] == pytest.approx(other["judges"]["j"][MEDIAN][key][value])
