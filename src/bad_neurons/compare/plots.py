"""Plots of a comparison, as matplotlib figures without pyplot's global state.

Each method has one colour of Okabe and Ito's palette, one marker and one kind of line in all figures, whatever else is drawn
beside it; the reference is black and thick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bad_neurons.artifacts import written_aside
from bad_neurons.compare.equal_kl import TRAINED
from bad_neurons.compare.tables import Tables, examples_text
from bad_neurons.compare.text import excludes_zero, main_rows, order
from bad_neurons.report.plots import literal, plain

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "s^DvPX<>phd*"
_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
_GREY = "#6b7280"
_DASHED = Line2D([], [], color=_GREY, linestyle="--")
_BANDS = 4  # methods whose bands can be told apart in one panel
_WIDTH = 8.6  # inches, as in the report
_DPI = 160


class Style(NamedTuple):
    """How a method is drawn.

    Attributes:
        colour: of everything.
        marker: of its points.
        line: of its curve.
        width: of its curve, in points.
        order: what lies above what.
    """

    colour: str
    marker: str
    line: Literal["-", "--", ":"]
    width: float
    order: float


def styles(methods: Sequence[str], reference: str) -> dict[str, Style]:
    """A style for each method: by its place among the sorted others; six colours, then the same ones dashed."""
    others = enumerate(sorted(set(methods) - {reference}))
    n = len(_COLOURS)
    found = {name: Style(_COLOURS[i % n], _MARKERS[i % len(_MARKERS)], _LINES[i // n % len(_LINES)], 1.5, 3) for i, name in others}
    return {reference: Style("black", "o", "-", 2.6, 4), **found}


def write_plots(tables: Tables, folder: Path) -> list[Path]:
    """Draw every figure that there is something for into a folder, as PNG.

    Args:
        tables: of the comparison.
        folder: where the files go.
    """
    figures = {
        "frontier": plot_frontier(tables),
        "frontier-by-method": plot_frontier_by_method(tables),
        "accuracy": plot_accuracy(tables),
        "differences": plot_differences(tables, "kl"),
        "differences-by-suite": plot_differences(tables, "suite"),
        "efficiency": plot_efficiency(tables),
    }
    drawn = {folder / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=_DPI)
    return list(drawn)


def plot_frontier(tables: Tables) -> Figure:
    """Opinion shift that is left against KL, a panel a suite; the markers are the levels of the tables.

    The axis is even in the root of KL, over which the curves are straight between what was measured. Bands of 95 % are drawn for a
    few methods; of many they would hide each other, and the reference's stands alone.
    """
    style = styles(list(tables.largest), tables.reference)
    banded = list(style) if len(style) <= _BANDS else [tables.reference]
    figure, panels = _panels(_suites(tables.curves), 2.9)
    for suite, ax in panels.items():
        for method in style:
            _curve(ax, tables, method, suite, style[method], band=method in banded)
        _kl_axis(ax, tables, room=0.08)
    _labels(figure, "KL to the clean model (nats per token; root scale)", "mean opinion shift left (nats)")
    _legend(figure, style, {f"KL {tables.bound:g}": _DASHED})
    return figure


def plot_frontier_by_method(tables: Tables) -> Figure | None:
    """Each method's curve with its 95 % band beside the reference's, a panel a method, averaged over the trained suites.

    Returns:
        None where there is nothing beside the reference, or no suite that was trained on.
    """
    style = styles(list(tables.largest), tables.reference)
    others = [method for method in style if method != tables.reference]
    if not others or TRAINED not in set(tables.curves["suite"]):
        return None
    figure, panels = _panels({method: method for method in others}, 2.3, across=3, sharex=True, sharey=True)
    for method, ax in panels.items():
        for one in (tables.reference, method):
            _curve(ax, tables, one, TRAINED, style[one], band=True)
        _kl_axis(ax, tables, room=0.15)
    _labels(figure, "KL to the clean model (nats per token; root scale)", "mean opinion shift left, mean of trained suites (nats)")
    _legend(figure, {tables.reference: style[tables.reference]}, {f"KL {tables.bound:g}": _DASHED})
    return figure


def _curve(ax: Axes, tables: Tables, method: str, suite: str, style: Style, band: bool) -> None:
    curves, marks = tables.curves, main_rows(tables.frontier, tables, measure="shift")
    curve, points = (rows[(rows["method"] == method) & (rows["suite"] == suite) & rows["after"].notna()] for rows in (curves, marks))
    x = np.sqrt(curve["kl"])
    if band:
        ax.fill_between(x, curve["after_low"], curve["after_high"], color=style.colour, alpha=0.15, linewidth=0, zorder=1)
    ax.plot(x, curve["after"], style.line, color=style.colour, linewidth=style.width, zorder=style.order)
    ax.plot(np.sqrt(points["kl"]), points["after"], style.marker, color=style.colour, markersize=5, zorder=5)


def _kl_axis(ax: Axes, tables: Tables, room: float) -> None:
    """Ticks at the levels of the tables, the bound's first, no two nearer than a share of the axis; lines at the bound and at 0."""
    top = float(np.sqrt(tables.curves["kl"].max()))
    ticks = [0.0]
    for level in (tables.bound, *reversed(tables.levels), 0.05, 0.1, 0.2, 0.5, 1.0):
        if level <= 1.02 * top**2 and min(abs(np.sqrt(level) - np.sqrt(tick)) for tick in ticks) > room * top:
            ticks.append(level)
    ax.set_xticks(np.sqrt(ticks), [f"{tick:g}" for tick in ticks], fontsize=8)
    ax.axvline(np.sqrt(tables.bound), color=_GREY, linewidth=1.2, linestyle="--")
    ax.axhline(0, color=_GREY, linewidth=1)


def plot_accuracy(tables: Tables) -> Figure | None:
    """Opinion shift that is left against multiple-choice accuracy at each strength, with both intervals; None without accuracies."""
    rows = main_rows(tables.results, tables)
    rows = rows[rows["accuracy_after"].notna() & rows["shift_after"].notna()] if "shift_after" in rows else rows[:0]
    if not len(rows):
        return None
    style = styles(list(tables.largest), tables.reference)
    figure, panels = _panels(_suites(rows), 2.9)
    for suite, ax in panels.items():
        for method, points in rows[rows["suite"] == suite].sort_values("strength").groupby("method"):
            colour, marker, line, width, above = style[method]
            x, y = points["accuracy_after"], points["shift_after"]
            ax.plot(x, y, line, marker=marker, markersize=5, color=colour, linewidth=0.7 * width, zorder=above)
            ax.vlines(x, points["shift_after_low"], points["shift_after_high"], color=colour, linewidth=0.9, alpha=0.35)
            ax.hlines(y, points["accuracy_after_low"], points["accuracy_after_high"], color=colour, linewidth=0.9, alpha=0.35)
        ax.axvline(rows["accuracy_before"].mean(), color=_GREY, linewidth=1.2, linestyle="--")
        ax.axhline(0, color=_GREY, linewidth=1)
    _labels(figure, "multiple-choice accuracy", "mean opinion shift left (nats)")
    _legend(figure, style, {"clean model's accuracy": _DASHED})
    return figure


def plot_differences(tables: Tables, panel: str) -> Figure | None:
    """Opinion shift that each method leaves, less that of the reference, with 95 % intervals; filled where they exclude 0.

    Args:
        tables: of the comparison.
        panel: what there is a panel for: each ``kl`` (mean over the trained suites), or each ``suite`` (at the KL bound).

    Returns:
        None where there is nothing to compare.
    """
    if not len(tables.differences):
        return None
    fixed = {"suite": TRAINED} if panel == "kl" else {"kl": tables.bound}
    rows = main_rows(tables.differences, tables, measure="shift", **fixed)
    if not len(rows):
        return None
    style = styles(list(tables.largest), tables.reference)
    best = rows.groupby("method")["difference"].mean()
    methods = sorted(best.index, key=lambda method: (np.nan_to_num(best[method], nan=np.inf), method))
    titles = {value: f"KL {value:g}" if panel == "kl" else str(value) for value in sorted(rows[panel].unique(), key=order)}
    figure, panels = _panels(titles, 0.6 + 0.24 * len(methods), across=4, sharex=True, grid="x")
    for value, ax in panels.items():
        here = rows[rows[panel] == value].set_index("method")
        for y, method in enumerate(methods):
            if method in here.index:
                _whisker(ax, y, here.loc[method], style[method])
        ax.axvline(0, color="black", linewidth=1.4)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_ylim(len(methods) - 0.4, -0.6)
        ax.set_yticks(range(len(methods)), [literal(method) for method in methods], fontsize=9)
        ax.tick_params(axis="y", labelleft=ax.get_subplotspec().is_first_col())  # type: ignore[union-attr]
    where = "mean of trained suites" if panel == "kl" else f"at KL {tables.bound:g}"
    figure.supxlabel(literal(f"opinion shift left, {where}, less that of {tables.reference} (nats)"), fontsize=10)
    return figure


def _whisker(ax: Axes, y: float, row: pd.Series[Any], style: Style) -> None:
    if not np.isfinite(row["difference"]):
        ax.annotate("KL not reached", (0, y), xytext=(4, 0), textcoords="offset points", fontsize=7, color=_GREY, va="center")
        return
    if np.isfinite(row["difference_low"]):
        ax.hlines(y, row["difference_low"], row["difference_high"], color=style.colour, linewidth=1.8)
    ax.plot(row["difference"], y, style.marker, color=style.colour, markersize=6, markerfacecolor=None if excludes_zero(row) else "white")


def plot_efficiency(tables: Tables) -> Figure | None:
    """Opinion shift that is left at the KL bound against the number of examples, with 95 % intervals; None for one number alone."""
    rows = tables.frontier.query("measure == 'shift' and kl == @tables.bound")
    numbers = sorted(rows["examples"].unique(), key=order)
    if len(numbers) < 2:
        return None
    style = styles(list(tables.largest), tables.reference)
    figure, panels = _panels(_suites(rows), 2.9)
    methods = sorted(style)
    for (suite, ax), (i, method) in product(panels.items(), enumerate(methods)):
        mine = rows[(rows["suite"] == suite) & (rows["method"] == method) & rows["after"].notna()]
        x = mine["examples"].map(numbers.index) + 0.045 * (i - (len(methods) - 1) / 2)
        mine = mine.assign(x=x).sort_values("x")
        colour, marker, line, width, above = style[method]
        ax.plot(mine["x"], mine["after"], line, marker=marker, markersize=5, color=colour, linewidth=width, zorder=above)
        ax.vlines(mine["x"], mine["after_low"], mine["after_high"], color=colour, linewidth=1, alpha=0.6)
        ax.set_xticks(range(len(numbers)), [examples_text(n) for n in numbers])
        ax.axhline(0, color=_GREY, linewidth=1)
    _labels(figure, "training examples", f"mean opinion shift left at KL {tables.bound:g} (nats)")
    _legend(figure, style, {})
    return figure


def _suites(rows: pd.DataFrame) -> dict[Any, str]:
    """Titles by suite, the means first; suites that were trained on say so."""
    trained = set(rows[rows["trained"]]["suite"])
    names = sorted(rows["suite"].unique(), key=order)
    return {name: name if order(name)[0] < 2 else f"{name} ({'trained' if name in trained else 'unseen'})" for name in names}


def _panels(
    titles: Mapping[Any, str], height: float, across: int = 2, sharex: bool = False, sharey: bool = False, grid: str = "y"
) -> tuple[Figure, dict[Any, Axes]]:
    """A figure with a panel for each title, so many side by side and each so many inches high."""
    across = min(across, len(titles))
    down = -(-len(titles) // across)
    figure = Figure(figsize=(_WIDTH, height * down + 1.0), layout="constrained")
    axes = list(figure.subplots(down, across, sharex=sharex, sharey=sharey, squeeze=False).flat)
    panels = dict(zip(titles, axes, strict=False))
    for name, ax in panels.items():
        ax.set_title(literal(titles[name]), fontsize=10)
        ax.tick_params(labelbottom=True)  # also above a place that stays empty
        plain(ax, grid)
    for ax in axes[len(titles) :]:
        ax.remove()
    return figure, panels


def _labels(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(literal(x), fontsize=10)
    figure.supylabel(literal(y), fontsize=10)


def _legend(figure: Figure, style: Mapping[str, Style], others: Mapping[str, Line2D]) -> None:
    lines = {
        literal(name): Line2D([], [], color=s.colour, marker=s.marker, linestyle=s.line, linewidth=s.width, markersize=5)
        for name, s in style.items()
    }
    entries = {**lines, **others}
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=4, frameon=False, fontsize=9, handlelength=3)
