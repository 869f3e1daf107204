"""Figures of a comparison: they show the numbers of the tables, and many methods can be told apart and read."""

from __future__ import annotations

from itertools import combinations

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from bad_neurons.compare import plots
from bad_neurons.compare.equal_kl import TRAINED, UNSEEN
from bad_neurons.compare.tables import Tables, make_tables
from comparison import comparison

MANY = [f"method-with-a-name-{number:02}" for number in range(11)]


def spread(method: str, seed: int, topic: str) -> float:
    """Something that differs between seeds and topics."""
    return (seed - 1) / 2 + len(topic) % 3 + (sum(map(ord, topic)) % 5) / 2


@pytest.fixture(scope="module")
def few() -> Tables:
    items, cells = (
        pd.concat(both)
        for both in zip(
            *(comparison({"random": 8, "probe": 5, "gradient": 12}, suites=("phil", "poli"), slope=spread, examples=(n,)) for n in (8, 64)),
            strict=True,
        )
    )
    items = items[(items["method"] != "probe") | (items["strength"] < 2)]
    return make_tables(items, cells[(cells["method"] != "probe") | (cells["strength"] < 2)], draws=50)


@pytest.fixture(scope="module")
def many() -> Tables:
    slopes = {"random": 8.0, **{name: 3.0 + number for number, name in enumerate(MANY)}}
    suites = ("embedded", "nlp", "phil", "poli", "truthfulqa")
    return make_tables(*comparison(slopes, suites=suites, trained_on="embedded,phil", topics=3, per_topic=1, slope=spread), draws=50)


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title() == title)


def test_twelve_methods_look_different_and_the_reference_stands_out():
    found = plots.styles(["random", *MANY], "random")
    assert found["random"].colour == "black"
    assert found["random"].width > max(found[name].width for name in MANY)
    assert len({(s.colour, s.line) for s in found.values()}) == 12
    assert len({s.marker for s in found.values()}) == 12
    assert found == plots.styles(list(reversed(MANY)), "random")


def test_curves_are_those_of_the_table(few):
    ax = panel(plots.plot_frontier(few), "phil (trained)")
    black = next(line for line in ax.lines if line.get_color() == "black" and line.get_linestyle() == "-")
    rows = few.curves.query("method == 'random' and suite == 'phil'").dropna(subset="after")
    np.testing.assert_allclose(np.square(black.get_xdata()), rows["kl"], atol=1e-12)
    np.testing.assert_allclose(black.get_ydata(), rows["after"])
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(np.square(marks[0].get_xdata()), few.levels)
    band = ax.collections[0].get_paths()[0].get_extents()
    assert band.ymax == pytest.approx(rows["after_high"].max())
    assert band.ymin == pytest.approx(rows["after_low"].min())
    assert any(np.allclose(line.get_xdata(), np.sqrt(few.bound)) for line in ax.lines)


def test_each_suite_and_mean_has_a_panel(few, many):
    assert [ax.get_title() for ax in plots.plot_frontier(few).axes] == [TRAINED, UNSEEN, "phil (trained)", "poli (unseen)"]
    assert len(plots.plot_frontier(many).axes) == 7
    assert [ax.get_title() for ax in plots.plot_frontier_by_method(many).axes] == MANY


def test_bands_are_drawn_for_few_methods_and_of_many_for_the_reference(few, many):
    assert len(panel(plots.plot_frontier(few), TRAINED).collections) == 3
    assert len(panel(plots.plot_frontier(many), TRAINED).collections) == 1
    assert len(panel(plots.plot_frontier_by_method(many), MANY[0]).collections) == 2


def test_differences_are_those_of_the_table_and_filled_where_they_exclude_0(few):
    figure = plots.plot_differences(few, "kl")
    assert [ax.get_title() for ax in figure.axes] == ["KL 0.002", "KL 0.005", "KL 0.01", "KL 0.02"]
    rows = few.differences.query("suite == @TRAINED and measure == 'shift' and examples == 64").set_index(["kl", "method"])
    assert rows.loc[(0.01, "gradient"), "excludes_zero"]
    ax = panel(figure, "KL 0.01")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["gradient", "probe"]
    drawn = {line.get_ydata()[0]: line for line in ax.lines if line.get_marker() not in ("None", "")}
    for y, method in enumerate(["gradient", "probe"]):
        row = rows.loc[(0.01, method)]
        assert drawn[y].get_xdata()[0] == pytest.approx(row["difference"])
        assert (drawn[y].get_markerfacecolor() == "white") == (not row["excludes_zero"])
        ends = [c.get_segments()[0][:, 0] for c in ax.collections if c.get_segments()[0][0, 1] == y]
        np.testing.assert_allclose(ends, [[row["difference_low"], row["difference_high"]]])


def test_a_kl_that_is_not_reached_is_written(few):
    ax = panel(plots.plot_differences(few, "kl"), "KL 0.02")
    assert [text.get_text() for text in ax.texts] == ["KL not reached"]
    assert ax.texts[0].xy[1] == 1  # probe


def test_accuracy_is_drawn_at_every_strength(few):
    ax = panel(plots.plot_accuracy(few), "phil (trained)")
    rows = few.results.query("method == 'random' and suite == 'phil' and examples == 64")
    black = next(line for line in ax.lines if line.get_color() == "black")
    np.testing.assert_allclose(black.get_xydata(), rows[["accuracy_after", "shift_after"]])


def test_efficiency_is_drawn_for_each_number_of_examples(few):
    ax = panel(plots.plot_efficiency(few), "phil (trained)")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["8", "64"]
    rows = few.frontier.query("method == 'random' and suite == 'phil' and measure == 'shift' and kl == 0.01")
    black = next(line for line in ax.lines if line.get_color() == "black")
    np.testing.assert_allclose(black.get_ydata(), rows["after"])


def test_nothing_to_draw_is_no_figure():
    items, cells = comparison({"random": 8}, trained_on="other")
    alone = make_tables(items, cells.assign(accuracy_after=np.nan), draws=50)
    assert plots.plot_accuracy(alone) is None
    assert plots.plot_differences(alone, "kl") is None
    assert plots.plot_differences(alone, "suite") is None
    assert plots.plot_efficiency(alone) is None
    assert plots.plot_frontier_by_method(alone) is None
    assert len(plots.plot_frontier(alone).axes) == 2
    others = make_tables(*comparison({"random": 8, "probe": 9}, trained_on="other"), draws=50)
    assert plots.plot_differences(others, "kl") is None
    assert plots.plot_differences(others, "suite") is not None


def test_names_are_no_formulas():
    tables = make_tables(*comparison({"random": 8, "$a$_b": 9}), draws=50)
    figure = plots.plot_differences(tables, "suite")
    assert figure.axes[0].get_yticklabels()[0].get_text() == r"\$a\$_b"


def overlapping(boxes):
    return [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize(
    "draw", [plots.plot_frontier, plots.plot_frontier_by_method, plots.plot_accuracy, lambda t: plots.plot_differences(t, "suite")]
)
def test_twelve_methods_and_seven_panels_can_be_read(many, draw):
    """No tick label lies on another one, and the legend and the axis names lie on nothing."""
    figure = draw(many)
    figure.draw_without_rendering()
    for ax in figure.axes:
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert not overlapping([label.get_window_extent() for label in labels if label.get_text() and label.get_visible()])
    outside = [legend.get_window_extent() for legend in figure.legends]
    outside += [text.get_window_extent() for text in (figure._supxlabel, figure._supylabel) if text is not None]
    assert outside
    assert not overlapping(outside)
    for ax in figure.axes:
        assert not any(box.overlaps(ax.get_tightbbox()) for box in outside)


def test_files(few, tmp_path):
    written = plots.write_plots(few, tmp_path)
    names = ["frontier", "frontier-by-method", "accuracy", "differences", "differences-by-suite", "efficiency"]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    for path in written:
        assert matplotlib.image.imread(path).shape[1] == round(8.6 * 160)
