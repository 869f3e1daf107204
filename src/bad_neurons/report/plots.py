"""Plots of a run, as matplotlib figures without pyplot's global state.

The colours are vermilion and blue of Okabe and Ito's palette, which stay apart in every common colour blindness; marker
shapes say the same a second time.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from bad_neurons.artifacts import written_aside
from bad_neurons.probe.module import Probe

BEFORE, AFTER, GREY = "#D55E00", "#0072B2", "#6b7280"
WIDTH = 8.6  # inches; 826 CSS pixels, the text width of the report
_TITLES = {"sae": "SAE features", "residual": "Residual activations"}

Curve = Sequence[tuple[float, float]]


def plot_weights(probe: Probe, control: Probe | None, path: Path) -> None:
    """Draw a probe's weights by rank, beside those of its control, into a PNG.

    Each weight is divided by the standard deviation of its layer's weights, so that loud layers do not pass for
    outliers. Weights of exactly zero belong to features that no training example has; they are left out, since they
    would raise the kurtosis of a sparse probe for nothing.

    Args:
        probe: the probe that the neurons are chosen from.
        control: the residual probe, or None.
        path: the PNG to write.
    """
    probes = [probe] if control is None else [probe, control]
    figure = Figure(figsize=(WIDTH if control else WIDTH / 2, 3.8), layout="constrained")
    panels = figure.subplots(1, len(probes), sharey=True, squeeze=False)[0]
    for ax, one, colour in zip(panels, probes, (AFTER, BEFORE), strict=False):
        _weights_panel(ax, one, colour)
    panels[0].set_ylabel("|weight| / standard deviation of its layer")
    panels[0].set_ylim(bottom=0)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=160)


def _weights_panel(ax: Axes, probe: Probe, colour: str) -> None:
    values = standardised_weights(probe)
    n = len(values)
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    expected = torch.special.ndtri(1 - (rank - 0.5) / (2 * n))
    ax.plot(rank.numpy(), values.abs().sort(descending=True).values.numpy(), ".", color=colour, markersize=4, label="weights")
    ax.plot(rank.numpy(), expected.numpy(), "--", color="black", linewidth=1.2, label="normal distribution")
    ax.set_xscale("log")
    title = _TITLES.get(str(probe.origin.get("features")), "Probe")
    ax.set_title(f"{title}: excess kurtosis {kurtosis(values):.1f}" if n > 1 else f"{title}: no weight but zero")
    ax.set_xlabel(f"rank among {n:,} weights (log scale)")
    ax.legend(frameon=False, loc="upper right")
    plain(ax)


def standardised_weights(probe: Probe) -> Tensor:
    """Non-zero weights of all layers, float64, each divided by the standard deviation of those of its layer."""
    layers = [w[w != 0].double() for _, w in sorted(probe.weights.items())]
    spread = [w / w.std(correction=0) for w in layers if len(w) > 1 and w.std(correction=0) > 0]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *spread])


def kurtosis(values: Tensor) -> float:
    """Excess kurtosis of values [N]: 0 for a normal distribution, high where few values lie far out."""
    centred = values.double() - values.double().mean()
    return float(centred.pow(4).mean() / centred.pow(2).mean().square()) - 3.0


def plot_shift(suites: Mapping[str, Any]) -> Figure:
    """Opinion shift of each suite before and after, with 95 % intervals.

    Args:
        suites: ``suites`` of ``results.json``; a side without the measure is left out.
    """
    figure = Figure(figsize=(WIDTH, 1.2 + 0.55 * max(len(suites), 1)), layout="constrained")
    ax = figure.subplots()
    for side, offset, colour, marker in (("before", -0.13, BEFORE, "o"), ("after", 0.13, AFTER, "s")):
        points = [(row + offset, (sides.get(side) or {}).get("opinion_shift")) for row, sides in enumerate(suites.values())]
        found = [(y, e["mean"], *e.get("ci95", [e["mean"]] * 2)) for y, e in points if e]
        if found:
            y, mean, low, high = zip(*found, strict=True)
            # The ends are drawn as they are: a percentile interval need not hold the mean, and error bars may not be negative.
            ax.hlines(y, low, high, color=colour, linewidth=1.8)
            ax.plot(mean, y, marker, color=colour, markersize=7, label=side)
    ax.axvline(0, color=GREY, linewidth=1, linestyle="--")
    ax.set_yticks(range(len(suites)), [literal(name) for name in suites])
    ax.set_ylim(len(suites) - 0.5, -0.5)
    ax.set_xlabel("opinion shift (nats); 0 = the person's opinion has no pull")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    plain(ax, grid="x")
    return figure


def plot_layers(counts: Mapping[int, int], size: int) -> Figure:
    """Chosen neurons of each candidate layer, with their share of the layer above the bars.

    Args:
        counts: chosen neurons by layer; a candidate without any counts 0.
        size: neurons of a layer.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    ax = figure.subplots()
    layers = sorted(counts)
    bars = ax.bar([str(layer) for layer in layers], [counts[layer] for layer in layers], color=AFTER, width=0.65)
    ax.bar_label(bars, [f"{100 * counts[layer] / size:.1f} %" for layer in layers], padding=2, fontsize=9 if len(layers) < 16 else 7)
    ax.margins(y=0.15)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.set_ylabel("chosen neurons")
    plain(ax)
    return figure


def plot_layer_curve(layers: Sequence[int], values: Sequence[float], taken: int, everything: float, score: str) -> Figure:
    """Validation score against the number of layers, with the layer that each step added written at its point.

    Args:
        layers: the layers in the order of the steps.
        values: the score behind each step.
        taken: how many of the steps were taken; a last one that improved nothing is drawn hollow.
        everything: the score with all candidates.
        score: name and unit of the score.
    """
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    steps = range(1, len(layers) + 1)
    ax.plot(steps[:taken], values[:taken], "o-", color=AFTER, linewidth=1.6, markersize=6, label="chosen layers", zorder=3)
    if len(layers) > taken:
        ax.plot(steps[max(taken - 1, 0) :], values[max(taken - 1, 0) :], ":", color=BEFORE, linewidth=1.4)
        ax.plot(steps[taken:], values[taken:], "s", color=BEFORE, markerfacecolor="white", markersize=6, label="the next best, no better")
    ax.axhline(everything, color=GREY, linewidth=1.2, linestyle="--", label="all candidates")
    for step, layer, value in zip(steps, layers, values, strict=True):
        ax.annotate(f"layer {layer}", (step, value), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    ax.margins(y=0.2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("number of layers")
    ax.set_ylabel(f"validation {score}")
    ax.legend(frameon=False)
    plain(ax)
    return figure


SCORES = {"auroc": "AUROC", "accuracy": "accuracy", "log_loss": "log loss (nats)"}


def plot_layer_choice(content: Mapping[str, Any]) -> Figure:
    """The curve of a greedy choice, from the content of ``layers.json``."""
    score = content["options"]["score"]
    layers, values = zip(*((step["layer"], step[score]) for step in content["curve"]), strict=True)
    return plot_layer_curve(layers, values, len(content["order"]), content["all_candidates"][score], SCORES[score])


# Terms of the loss that are drawn, as they are named in metrics.csv (`train/ce`), with the label of their axis.
TERMS = {
    "ce": "cross-entropy (nats per token)",
    "neutral_kl": "KL to neutral answer (nats per token)",
    "kl": "KL to clean model (nats per token)",
}


def plot_training(curves: Mapping[str, Curve]) -> Figure:
    """Each term of the loss against the optimizer step, training and validation, a panel a term.

    Args:
        curves: points ``(step, value)`` by ``train/<term>`` and ``val/<term>`` for the :data:`TERMS` that were logged.
    """
    labels = {name: label for name, label in TERMS.items() if {f"train/{name}", f"val/{name}"} & set(curves)}
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for ax, (name, label) in zip(panels, labels.items(), strict=True):
        for side, title, colour, style in (("train", "training", BEFORE, "-"), ("val", "validation", AFTER, "s-")):
            if points := curves.get(f"{side}/{name}"):
                step, value = zip(*points, strict=True)
                ax.plot(step, value, style if len(points) > 1 else "o", color=colour, linewidth=1.3, markersize=5, label=title)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ax.lines:
            ax.set_ylim(bottom=0)
            ax.legend(frameon=False)
        plain(ax)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def data_uri(figure: Figure) -> str:
    """The figure as an SVG in a ``data:`` address; letters are outlines, so that it needs no font."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bad-neurons"}):  # names of its parts are random otherwise
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def plain(ax: Axes, grid: str = "y") -> None:
    """Take off the frame above and to the right, and draw faint lines behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#e5e7eb", linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def literal(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
