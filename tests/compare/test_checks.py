"""Tables that do not hold together are refused with one line that names the column; what is left out is left out knowingly."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bad_neurons.compare.measured import MEASURES, Measured
from bad_neurons.errors import UserError
from comparison import comparison


@pytest.fixture
def tables():
    return comparison({"random": 8, "probe": 10}, seeds=2, suites=("phil", "poli"))


def put(table, column, value, row=3):
    """The table with one value replaced."""
    changed = table.astype({column: object})
    changed.loc[changed.index[row], column] = value
    return changed


@pytest.mark.parametrize("column", ["method", "examples", "strength", "suite", "topic", "id", "before", "odds_after", "person_is_right"])
def test_an_absent_column_of_items_is_named(tables, column):
    with pytest.raises(UserError, match=rf"^items: no column '{column}'; the table needs method, "):
        Measured(tables[0].drop(columns=column), tables[1])


@pytest.mark.parametrize("column", ["method", "seed", "kl", "accuracy_after", "train_seconds", "trained_on"])
def test_an_absent_column_of_cells_is_named(tables, column):
    with pytest.raises(UserError, match=rf"^cells: no column '{column}'; the table needs method, "):
        Measured(tables[0], tables[1].drop(columns=column))


@pytest.mark.parametrize(
    ("which", "column", "value", "message"),
    [
        ("items", "before", "much", r"items: column 'before': 'much' in row 3 is not a number"),
        ("items", "topic", None, r"items: column 'topic': empty in row 3"),
        ("items", "id", "", r"items: column 'id': empty in row 3"),
        ("items", "seed", 0.5, r"items: column 'seed': 0.5 in row 3; expected a whole number"),
        ("items", "strength", -1.0, r"items: column 'strength': -1.0 in row 3; expected a number of at least 0"),
        ("items", "strength", 3.0, r"items: column 'strength': random, 64 examples, seed 0, strength 3 has no row in the table of cells"),
        ("items", "person_is_right", "perhaps", r"items: column 'person_is_right': expected true, false or empty"),
        ("items", "topic", "topic 0", r"items: column 'topic': item 1-0 of suite phil is of two topics"),
        (
            "items",
            "before",
            40.0,
            r"items: column 'before': the mean shift on suite phil .* differs by 2.5 nats .* corrections of one model",
        ),
        ("cells", "kl", -0.5, r"cells: column 'kl': -0.5 at random, 64 examples, seed 0, strength 2 is below 0"),
        ("cells", "kl", "low", r"cells: column 'kl': 'low' in row 3 is not a number"),
        ("cells", "method", None, r"cells: column 'method': empty in row 3"),
        ("cells", "examples", None, r"cells: column 'examples': nan in row 3; expected a number of at least 0"),
        ("cells", "strength", 1.0, r"cells: column 'strength': random, 64 examples, seed 0, strength 1 is there twice"),
        ("cells", "trained_on", "poli", r"cells: column 'trained_on': 'phil' and 'poli' for random with 64 examples; expected the same"),
    ],
)
def test_a_bad_value_is_named_with_its_place(tables, which, column, value, message):
    items, cells = tables
    changed = (put(items, column, value), cells) if which == "items" else (items, put(cells, column, value))
    with pytest.raises(UserError, match=f"^{message}") as caught:
        Measured(*changed)
    assert "\n" not in str(caught.value)


def test_rows_twice_or_not_at_all(tables):
    items, cells = tables
    with pytest.raises(UserError, match=r"items: column 'id': .* strength 0, item 0-0 of suite phil is there twice"):
        Measured(pd.concat([items, items[:1]]), cells)
    with pytest.raises(UserError, match=r"items: column 'id': random, 64 .*, strength 0 has 14 of the 15 items of suite phil"):
        Measured(items[1:], cells)
    with pytest.raises(UserError, match=r"items: column 'method': the table has no rows"):
        Measured(items[:0], cells)


def test_tables_given_are_left_as_they_were(tables):
    before = [table.copy() for table in tables]
    Measured(*tables)
    for table, copy in zip(tables, before, strict=True):
        pd.testing.assert_frame_equal(table, copy)


def test_a_kl_that_rounding_put_below_0_is_0(tables):
    items, cells = tables
    assert Measured(items, put(cells, "kl", -1e-9, row=0)).cells["kl"].min() == 0


def test_rounding_of_the_clean_model_is_no_other_model(tables):
    items, cells = tables
    items["before"] += np.random.default_rng(0).normal(0, 0.02, len(items))
    sums = Measured(items, cells).sums("phil", "shift")
    np.testing.assert_allclose(sums.before / sums.counts, 2.1, atol=0.02)


def test_sums_over_topics(tables):
    """Topics of three items with a clean shift of 2, 2.1 and 2.2; the first has a person who is right, and odds are 1 higher."""
    measured = Measured(*tables)
    found = {measure: measured.sums("phil", measure) for measure in MEASURES}
    assert {measure: sums.counts.tolist() for measure, sums in found.items()} == {
        **dict.fromkeys(("shift", "abs_shift"), [3] * 5),
        **dict.fromkeys(("odds_right", "agree_right", "contradict_right"), [1] * 5),
        "accurate": [2] * 5,
    }
    before = {measure: sums.before[0] for measure, sums in found.items()}
    assert before == pytest.approx(
        {"shift": 6.3, "abs_shift": 6.3, "odds_right": 3.0, "agree_right": 1.0, "contradict_right": 0.0, "accurate": 2.0}
    )
    # `probe` is first; at strength 2 of KL 0.01 it takes off 10 * 0.2 nats of each item, and both accurate items fall.
    assert measured.cells["strength"].tolist()[:4] == [0, 0.5, 1, 2]
    after = {measure: sums.after[3, 0] for measure, sums in found.items()}
    assert after == pytest.approx(
        {"shift": 0.3, "abs_shift": 0.3, "odds_right": 1.0, "agree_right": 1.0, "contradict_right": 0.0, "accurate": 0.0}, abs=1e-12
    )


@pytest.mark.parametrize(
    ("odds", "unasked", "contradicts"),
    [(1.0, 0.5, 0), (-1.0, 0.5, 1), (-1.0, -0.5, 0), (1.0, -0.5, 0)],
    ids=["agrees", "is pushed away", "did not know it", "is pulled along"],
)
def test_contradiction_of_a_person_who_is_right(tables, odds, unasked, contradicts):
    items, cells = tables
    items[["odds_after", "after"]] = odds, odds - unasked
    assert (Measured(items, cells).sums("phil", "contradict_right").after == contradicts).all()


def test_an_item_without_a_neutral_question_has_no_shift_but_odds(tables):
    items, cells = tables
    items.loc[items["topic"] == "topic 0", ["before", "after"]] = np.nan
    measured = Measured(items, cells)
    assert measured.sums("phil", "shift").counts.tolist() == [3] * 4
    assert measured.sums("phil", "odds_right").counts.tolist() == [1] * 5


def test_a_measure_that_no_item_has_is_absent(tables):
    items, cells = tables
    items["person_is_right"] = None
    assert Measured(items, cells).sums("phil", "odds_right") is None


def test_suites_that_were_trained_on(tables):
    items, cells = tables
    assert Measured(items, cells.assign(trained_on="phil, embedded")).trained_on("random", 64) == {"phil"}
    assert Measured(items, cells.assign(trained_on=None)).trained_on("random", 64) == frozenset()
