"""Plots of a sweep, as matplotlib figures without pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from bad_neurons.compare.sweep import within

_INSIDE, _OUTSIDE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette
_COLUMNS, _PANEL = 3, (2.9, 2.6)  # inches


def plot_sweep(
    trials: Sequence[FrozenTrial], space: Mapping[str, BaseDistribution], bounds: Mapping[str, float], best: FrozenTrial | None
) -> Figure:
    """Remaining shift of each trial against each bounded measure and against each option; the best one in a ring.

    Trials within the bounds are blue dots, the others vermilion crosses. What is not a finite number is left out.

    Args:
        trials: the measured ones.
        space: what each option may be.
        bounds: the most that a measure may be.
        best: the best trial within the bounds, or None.
    """
    shown = [t for t in trials if math.isfinite(t.values[0])]
    count = len(bounds) + len(space)
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * _PANEL[0], rows * _PANEL[1]), layout="constrained")
    panels = [ax for line in figure.subplots(rows, columns, squeeze=False, sharey=True) for ax in line]
    for ax, (name, bound) in zip(panels, bounds.items(), strict=False):
        _panel(ax, shown, [t.user_attrs["measures"][name] for t in shown], best)
        ax.axvline(bound, color="black", linewidth=1, linestyle="--")
        ax.set_xlabel(f"{name} (bound {bound:g})")
    for ax, (name, values) in zip(panels[len(bounds) :], space.items(), strict=False):
        # Choices stand in the order of the space, whatever they are.
        places = {choice: place for place, choice in enumerate(values.choices)} if isinstance(values, CategoricalDistribution) else None
        _panel(ax, shown, [places[t.params[name]] if places else t.params[name] for t in shown], best)
        if places:
            ax.set_xticks(range(len(places)), [str(choice) for choice in places])
            ax.margins(x=0.3)
        elif isinstance(values, FloatDistribution | IntDistribution) and values.log:
            ax.set_xscale("log")  # three labelled ticks: matplotlib's own overlap within a decade or two
            ax.set_xticks(ticks := np.geomspace(values.low, values.high, 3), [f"{tick:.2g}" for tick in ticks])
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(name)
    for ax in panels[count:]:
        ax.set_axis_off()
    for ax in panels[::columns]:
        ax.set_ylabel("remaining shift (nats)")
        ax.set_ylim(bottom=0)
    return figure


def _panel(ax: Axes, trials: Sequence[FrozenTrial], x: Sequence[float], best: FrozenTrial | None) -> None:
    for inside, marker, colour in ((True, "o", _INSIDE), (False, "x", _OUTSIDE)):
        at = [i for i, trial in enumerate(trials) if within(trial) is inside]
        if at:
            ax.plot([x[i] for i in at], [trials[i].values[0] for i in at], marker, color=colour, markersize=4)
    ring = [i for i, trial in enumerate(trials) if best is not None and trial.number == best.number]
    ax.plot([x[i] for i in ring], [trials[i].values[0] for i in ring], "o", color="black", markersize=11, fillstyle="none")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
