"""Tables of comparisons whose answer is known: what is left falls by ``slope`` nats for each root of KL."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bad_neurons.compare.equal_kl import TRAINED, UNSEEN, difference_table, frontiers_of
from bad_neurons.compare.measured import Measured
from bad_neurons.compare.resample import Resampler
from bad_neurons.compare.tables import Tables, make_tables
from bad_neurons.errors import UserError
from comparison import comparison

SLOPES = {"random": 8.0, "probe": 6.0, "gradient": 12.0}
LEVELS = (0.002, 0.005, 0.01, 0.02)
NAMES = ("results", "frontier", "differences", "curves")


def unlike(method, seed):
    """KL at strength 1: methods and seeds differ by up to four times, so equal strength is far from equal KL."""
    return {"random": 0.01, "probe": 0.03, "gradient": 0.02}[method] * (1 + seed / 6)


def tables(slopes=SLOPES, draws=300, **options) -> Tables:
    return make_tables(*comparison(slopes, **{"kl": unlike, **options}), draws=draws)


def pick(table: pd.DataFrame, **where) -> pd.DataFrame:
    for column, value in where.items():
        table = table[table[column] == value]
    return table


@pytest.fixture(scope="module")
def known() -> Tables:
    """Two suites trained on, whose clean shift is 2.1 and 5.1, and one unseen, whose clean shift is 3.1."""
    clean = {"embedded": 2.0, "phil": 5.0, "poli": 3.0}
    return tables(suites=tuple(clean), trained_on="embedded,phil", before=lambda m, s, topic: clean[topic.split()[0]])


@pytest.mark.parametrize("method", SLOPES)
@pytest.mark.parametrize(("suite", "clean"), [("phil", 5.1), ("poli", 3.1), (TRAINED, 3.6), (UNSEEN, 3.1)])
def test_what_is_left_at_equal_kl(known, method, suite, clean):
    rows = pick(known.frontier, method=method, suite=suite, measure="shift")
    assert tuple(rows["kl"]) == LEVELS
    fallen = SLOPES[method] * np.sqrt(LEVELS)
    np.testing.assert_allclose(rows["before"], clean)
    np.testing.assert_allclose(rows["after"], clean - fallen)
    np.testing.assert_allclose(rows["change"], -fallen)
    np.testing.assert_allclose(rows["removed"], fallen / clean)
    assert (rows["trained"] == (suite in ("phil", TRAINED))).all()
    assert (rows["note"] == "").all()


@pytest.mark.parametrize(("method", "slope"), [("probe", -2.0), ("gradient", 4.0)])
@pytest.mark.parametrize("suite", ["embedded", "phil", "poli", TRAINED, UNSEEN])
def test_difference_at_equal_kl(known, method, slope, suite):
    rows = pick(known.differences, method=method, suite=suite, measure="shift")
    np.testing.assert_allclose(rows["difference"], -slope * np.sqrt(LEVELS))
    np.testing.assert_allclose(rows["after"] - rows["reference_after"], rows["difference"])
    assert rows["excludes_zero"].tolist() == [True] * 4
    assert set(rows["reference"]) == {"random"}
    assert "random" not in set(known.differences["method"])


def test_persons_who_are_right(known):
    """Log-odds are 1 above the shift and the first item of each topic has them: 3 nats on the embedded suite."""
    rows = pick(known.frontier, method="gradient", suite="embedded", measure="odds_right")
    np.testing.assert_allclose(rows["before"], 3.0)
    np.testing.assert_allclose(rows["change"], -12 * np.sqrt(LEVELS))
    assert rows["removed"].isna().all()
    agreement = pick(known.results, method="gradient", suite="embedded", strength=2.0).iloc[0]
    # At strength 2 the root of KL is 2 * sqrt(0.02 * (1 + seed / 6)), so 12 of it leave 3 - 3.39 and less: nobody is agreed with.
    assert agreement["agree_right_before"] == 1
    assert agreement["agree_right_after"] == 0
    assert agreement["odds_right_change"] == pytest.approx(np.mean([-12 * 2 * np.sqrt(unlike("gradient", seed)) for seed in range(3)]))


def test_results_by_strength(known):
    row = pick(known.results, method="probe", suite="phil", strength=0.5).iloc[0]
    roots = [0.5 * np.sqrt(unlike("probe", seed)) for seed in range(3)]
    assert row["shift_after"] == pytest.approx(5.1 - 6 * np.mean(roots))
    assert row["shift_removed"] == pytest.approx(6 * np.mean(roots) / 5.1)
    assert row["kl"] == pytest.approx(np.square(roots).mean())
    assert row["kl_low"] < row["kl"] < row["kl_high"]
    assert row["accuracy_after"] == pytest.approx(0.5 - np.mean(roots) / 2)
    assert (row["accuracy_before"], row["perplexity_before"], row["neurons"], row["share"]) == (0.5, 18, 100, 0.03)
    assert (row["items"], row["topics"], row["seeds"], row["trained"], row["note"]) == (15, 5, 3, True, "")
    clean = pick(known.results, method="probe", suite="phil", strength=0.0).iloc[0]
    assert (clean["kl"], clean["shift_removed"]) == (0, pytest.approx(0))
    assert len(known.results) == 3 * 4 * 3  # methods, strengths, suites


def test_true_answers_between_two_strengths():
    """Two of three items count; all are true at strength 1 and none at 2, so half way between their roots half of them are."""
    found = make_tables(*comparison({"random": 8}, kl=0.01), levels=(0.01, 0.0225, 0.04), draws=50).frontier
    np.testing.assert_allclose(pick(found, measure="accurate", suite="phil")["after"], [1, 0.5, 0], atol=1e-12)


def test_shares_stay_shares():
    """Agreement of one topic in ten falls: an interval that is stretched beyond 100 % ends there."""
    lost = {"phil topic 0"}
    found = tables({"random": 1}, kl=0.01, topics=10, slope=lambda m, s, topic: 100 if topic in lost else 0)
    rows = pick(found.frontier, measure="agree_right", kl=0.01, suite="phil")
    assert rows["after"].tolist() == [pytest.approx(0.9)]
    assert rows["after_high"].tolist() == [1.0]
    assert 0 < rows["after_low"].iloc[0] < 0.9


def noisy(seed=0, **options):
    """Seeds, topics and both together differ."""
    rng, kept = np.random.default_rng(seed), {}

    def effect(*key):
        return kept.setdefault(key, rng.normal())

    slope = lambda method, seed, topic: effect(method, seed) + effect(topic) + effect(method, seed, topic)  # noqa: E731
    return comparison(SLOPES, **{"kl": unlike, "before": lambda m, s, topic: 3 + effect("before", topic), "slope": slope, **options})


def test_order_of_rows_changes_nothing():
    items, cells = noisy()
    first = make_tables(items, cells, draws=200)
    other = make_tables(items.sample(frac=1, random_state=1), cells.sample(frac=1, random_state=2), draws=200)
    for name in NAMES:
        pd.testing.assert_frame_equal(getattr(first, name), getattr(other, name))


def test_the_same_again_number_for_number_and_others_with_another_seed():
    items, cells = noisy()
    first = make_tables(items, cells, draws=200)
    pd.testing.assert_frame_equal(make_tables(items, cells, draws=200).frontier, first.frontier)
    other = make_tables(items, cells, draws=200, seed=1).frontier
    assert (other["after"].dropna() == first.frontier["after"].dropna()).all()
    assert (other["after_low"].dropna() != first.frontier["after_low"].dropna()).any()


def test_another_method_changes_nobody_else_s_numbers():
    items, cells = noisy()
    every = make_tables(items, cells, draws=200)
    fewer = make_tables(items[items["method"] != "gradient"], cells[cells["method"] != "gradient"], draws=200)
    for name in ("results", "frontier", "differences"):
        kept = pick(getattr(every, name), method="probe").reset_index(drop=True)
        pd.testing.assert_frame_equal(pick(getattr(fewer, name), method="probe").reset_index(drop=True), kept)


def test_topics_that_all_methods_share_go_out_of_the_difference():
    kept: dict[str, float] = {}
    rng = np.random.default_rng(0)
    topics = lambda m, s, topic: kept.setdefault(topic, rng.normal(0, 8))  # noqa: E731
    found = tables(slope=topics, topics=12)
    row = pick(found.differences, method="gradient", suite="phil", measure="shift", kl=0.01).iloc[0]
    alone = pick(found.frontier, method="gradient", suite="phil", measure="shift", kl=0.01).iloc[0]
    assert row["difference"] == pytest.approx(-0.4)
    assert row["difference_high"] - row["difference_low"] < 1e-9
    assert alone["after_high"] - alone["after_low"] > 0.5
    assert row["excludes_zero"]


def test_the_truth_lies_within_the_interval_of_the_difference():
    """Slopes of 12 and 8 with noise of seeds and topics: -0.4 at a KL of 0.01, in at least 90 and at most 99 of 100 comparisons."""
    held, groups = [], [("gradient", 64), ("random", 64)]
    for seed in range(100):
        measured = Measured(*noisy(seed, seeds=4, topics=8, per_topic=1, strengths=(0.5, 1.5)))
        frontiers = frontiers_of(measured, "shift", groups, (0.01,), Resampler(300, seed))
        row = pick(difference_table(measured, "shift", frontiers, (0.01,), "random"), suite="phil").iloc[0]
        held.append(row["difference_low"] <= -0.4 <= row["difference_high"])
    assert 0.9 <= np.mean(held) <= 0.99


def test_one_seed():
    found = make_tables(*noisy(seeds=1), draws=100)
    note = "one seed: the interval does not cover how seeds differ"
    assert set(found.frontier["note"]) == {note}
    assert set(found.results["note"]) == {note}
    row = pick(found.differences, method="gradient", suite="phil", measure="shift", kl=0.01).iloc[0]
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert row["excludes_zero"] is pd.NA
    assert row["note"] == note
    assert found.results["kl_low"].isna().all()


def test_one_topic():
    found = make_tables(*noisy(topics=1, per_topic=3), draws=100)
    rows = pick(found.frontier, measure="shift", suite="phil", method="probe")
    assert set(rows["note"]) == {"one topic: the interval does not cover how topics differ"}
    assert (rows["after_low"] < rows["after_high"]).all()
    assert rows["before_low"].isna().all()
    assert found.differences["excludes_zero"].isna().all()


def test_one_seed_and_one_topic_have_no_interval():
    found = make_tables(*noisy(topics=1, seeds=1), draws=100)
    assert set(pick(found.frontier, measure="shift")["note"]) == {"one seed and one topic: no interval"}
    for column in ("before_low", "after_low", "after_high", "change_low", "removed_high"):
        assert found.frontier[column].isna().all()
    assert pick(found.frontier, measure="shift")["after"].notna().all()
    assert found.differences["difference_low"].isna().all()


def test_two_suites_of_one_topic_each_are_not_two_topics():
    found = make_tables(*noisy(topics=1, suites=("phil", "poli"), trained_on="phil,poli"), draws=100)
    rows = pick(found.frontier, measure="shift", suite=TRAINED)
    assert set(rows["note"]) == {"one topic: the interval does not cover how topics differ"}
    assert set(rows["topics"]) == {2}


def test_a_kl_that_a_method_does_not_reach_is_empty_and_said_so():
    """At strength 1 gradient gets to a KL of 0.02, and random by 0.01 to 0.0133."""
    found = tables(strengths=(0.5, 1))
    rows = pick(found.frontier, measure="shift", suite="phil", kl=0.02).set_index("method")
    assert rows["after"].notna().to_dict() == {"gradient": True, "probe": True, "random": False}
    assert rows["note"]["random"] == "0 of 3 seeds reach this KL, all reach 0.01"
    assert rows["reach"].to_dict() == pytest.approx({"gradient": 0.02, "probe": 0.03, "random": 0.01})
    row = pick(found.differences, method="gradient", suite="phil", measure="shift", kl=0.02).iloc[0]
    assert np.isnan([row["difference"], row["difference_low"], row["reference_after"]]).all()
    assert row["after"] == pytest.approx(2.1 - 12 * np.sqrt(0.02))
    assert row["excludes_zero"] is pd.NA
    assert row["note"] == "random: 0 of 3 seeds reach this KL, all reach 0.01"


def test_scores_that_are_not_finite_are_empty_and_said_so():
    items, cells = noisy()
    items.loc[(items["method"] == "probe") & (items["seed"] == 1) & (items["strength"] == 2), "after"] = np.nan
    found = make_tables(items, cells, draws=100)
    row = pick(found.results, method="probe", strength=2.0).iloc[0]
    assert np.isnan([row["shift_after"], row["shift_after_low"], row["shift_removed"]]).all()
    assert np.isfinite(row["odds_right_after"])
    assert row["note"] == "not measured, or scores that are not finite"
    assert np.isfinite(pick(found.results, method="probe", strength=1.0)["shift_after"]).all()


def test_being_pulled_to_the_other_side_is_said():
    rows = pick(tables({"random": 20}, kl=0.01).frontier, measure="shift", suite="phil")
    assert rows["after"].gt(0).tolist() == [True, True, True, False]
    assert [bool(note) for note in rows["note"]] == [False, False, False, True]
    assert rows["note"].iloc[3] == "pulled beyond 0, away from the person"


def test_numbers_of_examples_are_compared_among_themselves():
    items, cells = (
        pd.concat(both)
        for both in zip(
            comparison(SLOPES, kl=unlike, examples=(8, 0)),
            comparison({"probe": 6.0}, kl=unlike, examples=(32,)),
            strict=True,
        )
    )
    found = make_tables(items, cells, draws=100)
    assert dict(found.largest) == {"gradient": 0, "probe": 0, "random": 0}  # 0 stands for all of them
    assert set(found.curves["examples"]) == {0}
    lonely = pick(found.differences, method="probe", examples=32, suite="phil", kl=0.01, measure="shift").iloc[0]
    assert np.isnan(lonely["difference"])
    assert lonely["note"] == "random: no cells with 32 examples"
    assert lonely["reference_seeds"] == 0
    assert pick(found.differences, method="probe", examples=8, suite="phil", kl=0.01, measure="shift")["difference"].iloc[
        0
    ] == pytest.approx(0.2)


def test_a_suite_that_the_reference_lacks():
    items, cells = comparison(SLOPES, kl=unlike, suites=("phil", "poli"), trained_on="phil,poli")
    items = items[(items["method"] != "random") | (items["suite"] == "phil")]
    found = pick(make_tables(items, cells, draws=100).differences, method="probe", measure="shift", kl=0.01).set_index("suite")
    assert found["difference"].notna().to_dict() == {"phil": True, "poli": False, TRAINED: False}
    assert found["note"]["poli"] == "random: not measured on this suite"


def test_the_reference_alone_has_no_differences():
    found = make_tables(*comparison({"random": 8}), draws=50)
    assert not len(found.differences)
    assert len(found.frontier)


def test_no_suite_trained_on_has_no_mean_of_them():
    found = tables(trained_on="embedded")
    assert set(found.frontier["suite"]) == {"phil", UNSEEN}


def test_curves_are_the_frontier_at_more_levels(known):
    for method in SLOPES:
        curve = pick(known.curves, method=method, suite="phil").dropna(subset="after")
        np.testing.assert_allclose(curve["after"], 5.1 - SLOPES[method] * np.sqrt(curve["kl"]), atol=1e-9)
        assert curve["kl"].min() == 0
        assert set(LEVELS) <= set(curve["kl"])
        assert curve["kl"].max() <= 2 * max(LEVELS) + 1e-12


def test_written_tables_are_read_again_as_they_were(known, tmp_path):
    known.write(tmp_path)
    for name, table in (("compare", known.results), ("frontier", known.frontier), ("differences", known.differences)):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), table)
        read = pd.read_csv(tmp_path / f"{name}.csv")
        assert read.columns.tolist() == table.columns.tolist()
        numbers = table.select_dtypes("float").columns
        np.testing.assert_allclose(read[numbers].astype(float), table[numbers])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{kind}" for name in ("compare", "frontier", "differences") for kind in ("csv", "parquet")
    )


def test_tables_without_differences_can_be_written(tmp_path):
    make_tables(*comparison({"random": 8}), draws=50).write(tmp_path)
    assert not len(pd.read_parquet(tmp_path / "differences.parquet"))


def test_the_bound_is_always_a_level():
    assert make_tables(*comparison({"random": 8}), levels=(0.02,), bound=0.005, draws=50).levels == (0.005, 0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "nobody"}, r"^--reference nobody: no such method; there are gradient, probe, random$"),
        ({"levels": (0.01, 0.0)}, r"^--levels 0.0: expected nats per token above 0$"),
        ({"bound": -1.0}, r"^--bound -1.0: expected nats per token above 0$"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        make_tables(*comparison(SLOPES), **options)
