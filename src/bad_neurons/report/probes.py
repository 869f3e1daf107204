"""Compared probes as tables and as a plot, from the content of ``probes.json``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table

from bad_neurons.report.plots import AFTER, BEFORE, GREY, WIDTH, plain
from bad_neurons.report.terminal import estimate_text

SIDES = {"train": "Training", "in_domain": "In domain", "validation": "Unseen, validation", "test": "Unseen, test"}
FEATURES = {"sae": "SAE features", "residual": "Residual activations"}
TOKENS = {"answer": "answer", "all": "all tokens"}
_LOOKS = {"sae": (AFTER, "o", -0.12), "residual": (BEFORE, "s", 0.12)}


def probes_tables(content: Mapping[str, Any]) -> list[Table]:
    """All probes, and below them SAE features minus residual activations; AUROC above accuracy in each cell.

    Args:
        content: the content of ``probes.json``.
    """
    sides = [side for side in SIDES if side in content["sizes"][0]]
    caption = "AUROC above accuracy [95 % interval over topics]. l2 was chosen on the validation side, and nothing on the test side."
    tables = [_table(content["probes"], sides, caption)]
    if content["differences"]:
        unseen = [side for side in sides if side != "train"]
        tables.append(_table(content["differences"], unseen, "SAE features minus residual activations, on the same answers"))
    return tables


def page_of_probes(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of ``probes.json``: probes on all layers side by side with their differences, and titles."""
    most = len(content["layers"])
    rows = {kind: [row for row in content[kind] if len(row["layers"]) == most] for kind in ("probes", "differences")}
    sides = {side: title for side, title in SIDES.items() if side in content["sizes"][0]}
    return {**rows, "sizes": content["sizes"], "sides": sides, "features": FEATURES}


def layers_text(row: Mapping[str, Any]) -> str:
    """``layer 7``, or ``all layers`` for a probe that reads several."""
    return "all layers" if len(row["layers"]) > 1 else f"layer {row['layers'][0]}"


def _table(rows: Sequence[Mapping[str, Any]], sides: list[str], caption: str) -> Table:
    table = Table(caption=caption)
    table.add_column("Probe", no_wrap=True)
    for title in (["l2"] if "l2" in rows[0] else []) + [SIDES[side] for side in sides]:
        table.add_column(title, justify="right")
    for group, members in itertools.groupby(rows, lambda row: (row.get("features", "difference"), row["pool"], row["tokens"])):
        table.add_row("[bold]" + ", ".join(group))
        for row in members:
            scores = [row["scores"][side] for side in sides]
            cells = [f"{estimate_text(score['auroc'])}\n{estimate_text(score['accuracy'])}" for score in scores]
            table.add_row(layers_text(row), *([f"{row['l2']:g}"] if "l2" in row else []), *cells)
        table.add_section()
    return table


def plot_probes(content: Mapping[str, Any]) -> Figure:
    """Accuracy by layer, SAE features beside residual activations, with all layers side by side as a line.

    A panel a pooling, in domain above unseen topics. Bars are 95 % intervals over topics.
    """
    rows = content["probes"]
    poolings = list(dict.fromkeys((row["pool"], row["tokens"]) for row in rows))
    sides = [side for side in ("in_domain", "test") if side in content["sizes"][0]]
    figure = Figure(figsize=(WIDTH, 0.9 + 2.2 * len(sides)), layout="constrained")
    panels = figure.subplots(len(sides), len(poolings), sharex=True, sharey=True, squeeze=False)
    for axes, side in zip(panels, sides, strict=True):
        axes[0].set_ylabel(f"accuracy,\n{'in domain' if side == 'in_domain' else 'unseen topics'}")
        majority = sum(size[side]["majority"] for size in content["sizes"]) / len(content["sizes"])
        for ax, (pool, tokens) in zip(axes, poolings, strict=True):
            _panel(ax, [row for row in rows if (row["pool"], row["tokens"]) == (pool, tokens)], side)
            ax.axhline(majority, color=GREY, linewidth=1, linestyle=":", label="the commoner label")
            if side == sides[0]:
                ax.set_title(f"{pool} over {'the answer' if tokens == 'answer' else TOKENS[tokens]}", fontsize=10)
            if side == sides[-1]:
                ax.set_xlabel("layer")
            plain(ax)
    handles = {label: handle for handle, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _panel(ax: Axes, rows: list[Mapping[str, Any]], side: str) -> None:
    for features, (colour, marker, beside) in _LOOKS.items():
        of_kind = [(row["layers"], row["scores"][side]["accuracy"]) for row in rows if row["features"] == features]
        alone = [(layers[0] + beside, value) for layers, value in of_kind if len(layers) == 1]
        if alone:
            x, values = zip(*alone, strict=True)
            ax.vlines(x, *zip(*(value["ci95"] for value in values), strict=True), color=colour, linewidth=1, alpha=0.6)
            ax.plot(x, [value["mean"] for value in values], marker, color=colour, markersize=4, label=f"{FEATURES[features]}, one layer")
        for value in [value for layers, value in of_kind if len(layers) > 1]:
            ax.axhline(value["mean"], color=colour, linewidth=1.4, linestyle="--", label=f"{FEATURES[features]}, all layers")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
