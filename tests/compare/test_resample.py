"""Intervals over topics and seeds: against drawing by hand, the t interval, and the truth of simulated data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bad_neurons.compare.resample import Estimates, Resampler, expansion, mean_of

COUNTS = np.array([1.0, 3.0, 2.0, 2.0])  # items of four topics


def test_expansion_is_the_width_of_a_t_interval_over_that_of_the_percentiles():
    # t quantiles at 0.975 from a table: 12.706 (1 degree of freedom), 2.776 (4), 2.093 (19); the normal one is 1.96.
    assert expansion(2) == pytest.approx(np.sqrt(2) * 12.706 / 1.96, abs=1e-3)
    assert expansion(5) == pytest.approx(np.sqrt(5 / 4) * 2.776 / 1.96, abs=1e-3)
    assert expansion(20) == pytest.approx(np.sqrt(20 / 19) * 2.093 / 1.96, abs=1e-3)
    assert expansion(1) == 0


def test_draws_depend_on_name_number_and_seed_alone():
    first = Resampler(50).counts("topics of phil", 6)
    other = Resampler(50)
    other.counts("seeds 0 1 2 3 4", 5)
    np.testing.assert_array_equal(other.counts("topics of phil", 6), first)
    assert (first.sum(1) == 6).all()
    for different in (Resampler(50).counts("topics of poli", 6), Resampler(50, seed=1).counts("topics of phil", 6)):
        assert (different != first).any()


def by_hand(items, drawn):
    """Mean over the items of drawn topics, one draw after the other."""
    return [np.mean([value for topic, times in enumerate(row) for value in items[topic] * int(times)]) for row in drawn]


def test_a_draw_of_topics_pools_the_items_of_whole_topics():
    items = [[1.0], [2.0, 5.0, -1.0], [0.5, 0.5], [4.0, 3.0]]
    draw = Resampler(200)
    found = draw.over_topics(np.array([[sum(topic) for topic in items]]), COUNTS, "phil")
    assert found.value[0] == pytest.approx(15 / 8)
    means = by_hand(items, draw.counts("topics of phil", 4))
    np.testing.assert_allclose(found.draws[:, 0], 15 / 8 + expansion(4) * (np.array(means) - 15 / 8))


def test_a_draw_of_seeds_is_a_mean_of_seeds():
    values = np.array([[1.0, 10.0], [2.0, 10.0], [6.0, 10.0]])
    draw = Resampler(200)
    found = draw.over_seeds(values, np.arange(3))
    np.testing.assert_allclose(found.value, [3, 10])
    means = [
        np.mean([values[seed, 0] for seed, times in enumerate(row) for _ in range(int(times))]) for row in draw.counts("seeds 0 1 2", 3)
    ]
    np.testing.assert_allclose(found.draws[:, 0], 3 + expansion(3) * (np.array(means) - 3))
    np.testing.assert_allclose(found.draws[:, 1], 10)


def test_both_draws_add_up_and_one_of_a_kind_varies_not():
    sums = np.random.default_rng(0).normal(size=(3, 2, 4))
    draw = Resampler(200)
    runs = np.arange(3)
    both = draw.over_both(sums, COUNTS, "phil", runs)
    topics = draw.over_topics(sums.mean(0), COUNTS, "phil")
    seeds = draw.over_seeds(sums.sum(-1) / 8, runs)
    np.testing.assert_allclose(both.value, topics.value)
    np.testing.assert_allclose(both.draws - both.value, topics.draws - topics.value + seeds.draws - seeds.value, atol=1e-12)
    one_seed = draw.over_both(sums[:1], COUNTS, "phil", runs[:1])
    np.testing.assert_allclose(one_seed.draws, draw.over_topics(sums[0], COUNTS, "phil").draws)
    one_topic = draw.over_both(sums[..., :1], COUNTS[:1], "phil", runs)
    np.testing.assert_allclose(one_topic.draws, draw.over_seeds(sums[..., 0], runs).draws)
    nothing = draw.over_both(sums[:1, :, :1], COUNTS[:1], "phil", runs[:1])
    assert (nothing.draws == nothing.value).all()


def test_arithmetic_is_draw_by_draw():
    a, b = Estimates(np.array([6.0]), np.array([[5.0], [8.0]])), Estimates(np.array([3.0]), np.array([[4.0], [2.0]]))
    assert (a - b).draws.tolist() == [[1.0], [6.0]]
    assert mean_of([a, b]).draws.tolist() == [[4.5], [5.0]]
    removed = b.removed_from(a)
    assert removed.value.tolist() == [0.5]
    np.testing.assert_allclose(removed.draws, [[0.2], [0.75]])
    assert b.columns("x", varied=False)["x_low"] != b.columns("x", varied=False)["x_low"]  # NaN


@pytest.mark.parametrize("n", [5, 12])
def test_the_interval_of_normal_numbers_is_about_the_t_interval(n):
    ratios = []
    for seed in range(40):
        values = np.random.default_rng(seed).normal(size=n)
        found = Resampler(2000, seed).over_seeds(values[:, None], np.arange(n)).columns("x")
        low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        ratios.append((found["x_high"][0] - found["x_low"][0]) / (high - low))
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)


def simulate(rng, seed_sd, topic_sd, noise_sd, seeds=5, topics=10):
    """Topic sums [S, 1, T] and counts of numbers whose truth is 0; topics have one to three items."""
    counts = rng.integers(1, 4, topics).astype(float)
    means = rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, topic_sd, topics) + rng.normal(0, noise_sd, (seeds, topics))
    return (means * counts)[:, None], counts


SPREADS = [(1.0, 0.2, 0.3), (0.2, 1.0, 0.3), (0.3, 0.9, 1.0)]  # seeds differ most, topics do, and all do


@pytest.mark.parametrize("spread", SPREADS)
def test_the_interval_holds_the_truth_as_often_as_it_says(spread):
    rng = np.random.default_rng(1)
    held = []
    for number in range(200):
        found = Resampler(600, number).over_both(*simulate(rng, *spread), "phil", np.arange(5)).columns("x")
        held.append(found["x_low"][0] <= 0 <= found["x_high"][0])
    assert 0.90 <= np.mean(held) <= 0.99


def test_without_the_expansion_five_seeds_would_say_too_much():
    """Truth inside the plain percentiles of seeds alone: 84 % by the t distribution with 4 degrees of freedom."""
    expected = 1 - 2 * stats.t.sf(1.96 / np.sqrt(5 / 4), 4)
    assert expected == pytest.approx(0.845, abs=0.003)
    rng, held = np.random.default_rng(2), []
    for number in range(400):
        found = Resampler(600, number).over_seeds(rng.normal(size=(5, 1)), np.arange(5))
        low, high = np.quantile((found.draws - found.value) / expansion(5) + found.value, [0.025, 0.975])
        held.append(low <= 0 <= high)
    assert np.mean(held) == pytest.approx(expected, abs=0.05)


def widths_and_held(one_seeds, other_seeds, of_topic, of_seed):
    """Truth -0.2 beside topics and seeds whose effects both methods have: how often the interval of the difference holds it, and widths."""
    rng, held, widths, alone = np.random.default_rng(3), [], [], []
    for number in range(200):
        draw = Resampler(600, number)
        shared, counts = rng.normal(0, of_topic, 10), rng.integers(1, 4, 10).astype(float)
        of_run = rng.normal(0, of_seed, 20)
        one, other = (
            draw.over_both(
                ((shared + shift + of_run[seeds, None] + rng.normal(0, 0.1, (5, 1)) + rng.normal(0, 0.1, (5, 10))) * counts)[:, None],
                counts,
                "phil",
                seeds,
            )
            for seeds, shift in ((one_seeds, -0.2), (other_seeds, 0.0))
        )
        low, high = (float(end[0]) for name, end in (one - other).columns("x").items() if name != "x")
        held.append(low <= -0.2 <= high)
        widths.append(high - low)
        alone.append(float(np.diff([end[0] for name, end in one.columns("x").items() if name != "x"])[0]))
    return np.mean(held), np.mean(widths), np.mean(alone)


SEEDS = np.arange(5)


def test_what_two_methods_share_goes_out_of_their_difference():
    """Topics that differ by 2: the difference is seen, and its interval holds the truth as often as it says."""
    held, width, alone = widths_and_held(SEEDS, SEEDS, 2, 0)
    assert 0.90 <= held <= 0.99
    assert width < alone / 5


def test_what_seeds_share_goes_out_of_the_difference_of_methods_that_have_the_same():
    """A seed draws the training records, so a lucky one is lucky for all methods. Others' seeds stand for themselves."""
    held, width, alone = widths_and_held(SEEDS, SEEDS, 0, 2)
    assert 0.90 <= held <= 0.99
    assert width < alone / 5
    held, width, alone = widths_and_held(SEEDS, SEEDS + 5, 0, 2)
    assert 0.90 <= held <= 1
    assert width > alone
