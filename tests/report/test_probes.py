"""Compared probes as tables and as a plot."""

from __future__ import annotations

import io

import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from bad_neurons.report.plots import AFTER, BEFORE
from bad_neurons.report.probes import plot_probes, probes_tables

POOLINGS = [("max", "answer"), ("mean", "all")]
SIDES = ("train", "in_domain", "validation", "test")


def content(sides=SIDES, sae=True):
    """Two layers; every number is another one."""
    numbers = iter(range(1, 1000))

    def estimate():
        value = next(numbers) / 1000
        return {"mean": value, "ci95": [value - 0.0005, value + 0.0005]}

    def row(pool, tokens, layers, **more):
        scores = {side: {"accuracy": estimate(), "auroc": estimate()} for side in sides}
        return {**more, "pool": pool, "tokens": tokens, "layers": layers, "scores": scores}

    kinds = ["sae", "residual"] if sae else ["residual"]
    probes = [row(*p, layers, features=k, l2=0.1) for p in POOLINGS for k in kinds for layers in ([5, 9], [5], [9])]
    differences = [row(*p, layers) for p in POOLINGS for layers in ([5, 9], [5], [9])] if sae else []
    return {"layers": [5, 9], "sizes": [{side: {"majority": 0.6} for side in sides}], "probes": probes, "differences": differences}


def lines(table):
    console = Console(width=130, file=io.StringIO(), record=True)
    console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if line.startswith("│")]


def test_tables_have_every_probe():
    probes, differences = probes_tables(content())
    rows = lines(probes)
    assert len(rows) == 4 * (1 + 3 * 2)
    assert rows[0] == ["sae, max, answer", "", "", "", "", ""]
    # The first probe has the numbers 1 to 8: accuracy, then AUROC, side by side.
    assert rows[1] == ["all layers", "0.1", "0.00 [0.00, 0.00]", "0.00 [0.00, 0.00]", "0.01 [0.01, 0.01]", "0.01 [0.01, 0.01]"]
    assert [row[0] for row in rows[1:7:2]] == ["all layers", "layer 5", "layer 9"]
    rows = lines(differences)
    assert len(rows) == 2 * (1 + 3 * 2)
    assert rows[0] == ["difference, max, answer", "", "", ""]
    assert len(rows[1]) == 4  # not of the training side


def test_auroc_stands_above_accuracy():
    found = content()
    found["probes"][0]["scores"]["test"] = {"accuracy": {"mean": 0.25, "ci95": [0.2, 0.3]}, "auroc": {"mean": 0.75, "ci95": [0.7, 0.8]}}
    rows = lines(probes_tables(found)[0])
    assert (rows[1][-1], rows[2][-1]) == ("0.75 [0.70, 0.80]", "0.25 [0.20, 0.30]")


def test_without_saes_and_in_domain_there_is_one_smaller_table():
    [table] = probes_tables(content(("train", "validation", "test"), sae=False))
    assert [column.header for column in table.columns] == ["Probe", "l2", "Training", "Unseen, validation", "Unseen, test"]


@pytest.mark.parametrize(("sides", "panels"), [(SIDES, 4), (("train", "validation", "test"), 2)])
def test_plot_draws_each_number_at_its_place(sides, panels):
    found = content(sides)
    figure = plot_probes(found)
    assert len(figure.axes) == panels
    shown = [side for side in ("in_domain", "test") if side in sides]
    places = [(side, pooling) for side in shown for pooling in POOLINGS]
    for ax, (side, pooling) in zip(figure.axes, places, strict=True):
        rows = [row for row in found["probes"] if (row["pool"], row["tokens"]) == pooling]
        for features, colour in (("sae", AFTER), ("residual", BEFORE)):
            of_kind = [line for line in ax.lines if to_hex(line.get_color()).upper() == colour]
            points, together = of_kind
            accuracies = [row["scores"][side]["accuracy"]["mean"] for row in rows if row["features"] == features]
            assert list(points.get_ydata()) == accuracies[1:]
            assert [round(x) for x in points.get_xdata()] == [5, 9]
            assert set(together.get_ydata()) == {accuracies[0]}
