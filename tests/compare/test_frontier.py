"""Frontiers: straight over the root of KL, nothing beyond a seed's last point."""

from __future__ import annotations

import numpy as np
import pytest

from bad_neurons.compare.frontier import frontier, interpolation, mean_frontier
from bad_neurons.compare.measured import Measured
from bad_neurons.compare.resample import Resampler
from comparison import comparison

LEVELS = np.array([0.0, 0.0025, 0.01, 0.0225, 0.04])  # roots 0, 0.05, 0.1, 0.15, 0.2


def test_weights_are_straight_lines_over_the_root():
    # Points at the roots 0 (clean), 0.1, 0.2: a root of 0.05 is half way between the first two.
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    np.testing.assert_allclose(interpolation(np.array([0.01, 0.04]), LEVELS), expected, atol=1e-12)


def test_points_may_come_in_any_order_and_agree_with_numpy():
    rng = np.random.default_rng(0)
    kl, shift = rng.random(6), rng.normal(size=6)
    levels = np.linspace(0, kl.max(), 50)
    order = np.argsort(kl)
    expected = np.interp(np.sqrt(levels), np.sqrt([0, *kl[order]]), [2.0, *shift[order]])
    np.testing.assert_allclose(interpolation(kl, levels) @ [2.0, *shift], expected, atol=1e-12)


def test_points_of_equal_kl_count_as_their_mean():
    np.testing.assert_allclose(interpolation(np.array([0.01, 0.01]), LEVELS[:3]), [[1, 0, 0], [0.5, 0.25, 0.25], [0, 0.5, 0.5]], atol=1e-12)
    np.testing.assert_allclose(interpolation(np.array([0.0]), LEVELS[:1]), [[0.5, 0.5]])


def test_nothing_beyond_the_last_point():
    weights = interpolation(np.array([0.01]), LEVELS)
    assert np.isfinite(weights[:3]).all()
    assert np.isnan(weights[3:]).all()
    assert np.isnan(interpolation(np.array([]), LEVELS)[1:]).all()


def of(tables, method="random", levels=LEVELS, measure="shift", suite="phil"):
    measured = Measured(*tables)
    return frontier(measured, measured.sums(suite, measure), method, 64, suite, levels, Resampler(100))


def test_a_known_frontier():
    """2.1 nats before (items add 0, 0.1 and 0.2); 8 nats less for a root of 1; strengths 0.5, 1, 2 of a KL of 0.01 at 1."""
    found = of(comparison({"random": 8}))
    np.testing.assert_allclose(found.before.value, [2.1])
    np.testing.assert_allclose(found.after.value, [2.1, 1.7, 1.3, 0.9, 0.5])
    assert (found.reach, found.items, found.topics, found.seeds) == (pytest.approx(0.04), 15, (5,), 3)
    assert found.notes == ("",) * 5


def test_strength_0_changes_nothing():
    with_it, without = comparison({"random": 8}), comparison({"random": 8}, strengths=(0.5, 1, 2))
    np.testing.assert_array_equal(of(with_it).after.draws, of(without).after.draws)


def test_each_seed_has_its_own_kl():
    """Seeds reach a KL of 0.01, 0.02 and 0.04 at strength 1, and their lines meet at equal KL all the same."""
    tables = comparison({"random": 8}, kl=lambda method, seed: 0.01 * 2**seed, strengths=(0.5, 2))
    np.testing.assert_allclose(of(tables).after.value, [2.1, 1.7, 1.3, 0.9, 0.5])


def test_no_value_where_a_seed_does_not_reach():
    tables = comparison({"random": 8}, kl=lambda method, seed: 0.01 / (1 + seed), strengths=(1,))
    found = of(tables, levels=[0.002, 0.004, 0.006, 0.01, 0.02])
    assert np.isfinite(found.after.value).tolist() == [True, False, False, False, False]
    assert found.reach == pytest.approx(0.01 / 3)
    assert found.notes[:2] == ("", "2 of 3 seeds reach this KL, all reach 0.0033")
    assert found.notes[3].startswith("1 of 3 seeds")
    assert found.notes[4].startswith("0 of 3 seeds")


@pytest.mark.parametrize("table", ["items", "cells"])
def test_a_point_that_is_not_finite_is_left_out(table):
    items, cells = comparison({"random": 8})
    frame, column = (items, "after") if table == "items" else (cells, "kl")
    frame.loc[frame.index[(frame["seed"] == 1) & (frame["strength"] == 2)][0], column] = np.inf
    found = of((items, cells))
    assert found.reach == pytest.approx(0.01)
    np.testing.assert_allclose(found.after.value[:3], [2.1, 1.7, 1.3])
    assert np.isnan(found.after.value[3:]).all()
    assert found.notes[0] == "strength 2 of seed 1 left out: not finite"
    assert found.notes[4] == "2 of 3 seeds reach this KL, all reach 0.01; strength 2 of seed 1 left out: not finite"


def test_a_seed_without_any_point_reaches_nothing():
    items, cells = comparison({"random": 8})
    cells.loc[(cells["seed"] == 1) & (cells["strength"] > 0), "kl"] = np.nan
    found = of((items, cells))
    assert found.reach == 0
    np.testing.assert_allclose(found.after.value[0], 2.1)
    assert np.isnan(found.after.value[1:]).all()
    assert found.notes[1] == "2 of 3 seeds reach this KL, all reach 0; strength 0.5 of seed 1 and 2 more left out: not finite"


def test_absolute_shift_does_not_reward_the_other_side():
    """Two topics at 2 and 1 nats, 8 nats less for a root of 1: at a root of 0.2 they are at 0.4 and -0.6."""
    tables = comparison({"random": 8}, topics=2, per_topic=1, before=lambda m, s, topic: 2.0 if "topic 0" in topic else 1.0)
    assert of(tables).after.value[4] == pytest.approx(-0.1)
    assert of(tables, measure="abs_shift").after.value[4] == pytest.approx(0.5)


def test_the_mean_over_suites_weighs_them_alike():
    tables = comparison({"random": 8}, suites=("phil", "poli"), before=lambda m, s, topic: 2.0 if "phil" in topic else 5.0)
    phil, poli = (of(tables, suite=suite) for suite in ("phil", "poli"))
    mean = mean_frontier([phil, poli])
    np.testing.assert_allclose(mean.before.value, [3.6])
    np.testing.assert_allclose(mean.after.value, (phil.after.value + poli.after.value) / 2)
    np.testing.assert_allclose(mean.after.draws, (phil.after.draws + poli.after.draws) / 2)
    assert (mean.items, mean.topics) == (30, (5, 5))


def test_a_method_that_was_not_measured_on_a_suite_has_no_frontier_there():
    items, cells = comparison({"random": 8, "probe": 9}, suites=("phil", "poli"))
    items = items[(items["method"] == "random") | (items["suite"] == "phil")]
    assert of((items, cells), "random", suite="poli") is not None
    assert of((items, cells), "probe", suite="poli") is None
