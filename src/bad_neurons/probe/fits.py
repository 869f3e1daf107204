"""Probes on each layer alone and on all side by side, fitted to the end and measured.

Legend: N answers, D features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bad_neurons.probe.divide import Answers
from bad_neurons.probe.gram import DualLogistic, gram, validation_logits
from bad_neurons.probe.layers import check_memory, validation_scores
from bad_neurons.probe.measures import Measured, mean_of

Layers = tuple[int, ...]
Scores = dict[str, dict[str, Measured]]  # by side and measure


class Fitted(NamedTuple):
    """A probe with the best of several penalties.

    Attributes:
        layers: layers that it reads side by side.
        l2: the penalty.
        scores: its measures by side, means over the divisions.
    """

    layers: Layers
    l2: float
    scores: Scores


def layer_sets(layers: Sequence[int]) -> list[Layers]:
    """What a probe may read: all layers side by side, and each alone."""
    return [tuple(layers)] * (len(layers) > 1) + [(layer,) for layer in layers]


def best_probes(
    read: Callable[[int], Tensor],
    layers: Sequence[int],
    labels: Tensor,
    answers: Sequence[Answers],
    penalties: Sequence[float],
    progress: Callable[[], object] = lambda: None,
) -> list[Fitted]:
    """A probe for each of :func:`layer_sets`, with the penalty whose AUROC on the validation side is best.

    Equal AUROCs are decided by the log loss.

    Args:
        read: features [N, D] of a layer.
        layers: the layers.
        labels: labels [N], 1 is sycophantic.
        answers: the sides of each division.
        penalties: penalties to choose from.
        progress: called behind each fit.
    """
    logits: dict[tuple[Layers, float], list[Tensor]] = {}
    for division in answers:
        for chosen, l2, values in _fits(read, layers, labels, division, penalties):
            logits.setdefault((chosen, l2), []).append(values)
            progress()

    def validation(chosen: Layers, l2: float) -> tuple[float, float]:
        rows = [division.rows["validation"] for division in answers]
        found = [validation_scores(values[at], labels[at].double()) for values, at in zip(logits[chosen, l2], rows, strict=True)]
        return sum(scores.auroc for scores in found), -sum(scores.log_loss for scores in found)

    best = [(chosen, max(penalties, key=lambda l2: validation(chosen, l2))) for chosen in layer_sets(layers)]
    return [Fitted(chosen, l2, _scores(logits[chosen, l2], answers)) for chosen, l2 in best]


def _fits(
    read: Callable[[int], Tensor], layers: Sequence[int], labels: Tensor, division: Answers, penalties: Sequence[float]
) -> Iterator[tuple[Layers, float, Tensor]]:
    """Layers, penalty and log-odds [N] (of the answers of this division) of one probe after the other."""
    train = division.rows["train"]
    others = torch.cat([rows for side, rows in division.rows.items() if side != "train"])
    check_memory(len(layers), len(train), len(others), len(penalties))
    solvers = {l2: DualLogistic(labels[train], l2) for l2 in sorted(penalties, reverse=True)}
    grams = {}
    for layer in layers:
        x = read(layer)
        grams[layer] = gram(x[train], x[others])
    for chosen in layer_sets(layers):
        start, parts = None, [grams[layer] for layer in chosen]
        for l2, solver in solvers.items():  # from the strongest on: each is a good start for the next
            fit = solver.fit(parts, start)
            start = fit.logits
            logits = torch.full((len(labels),), torch.nan, dtype=torch.float64)
            logits[train], logits[others] = fit.logits, validation_logits(fit, parts)
            yield chosen, l2, logits


def _scores(logits: Sequence[Tensor], answers: Sequence[Answers]) -> Scores:
    """Measures of the log-odds [N] of each division."""
    found: Scores = {}
    for side in answers[0].rows:
        of_side = [(division.measures[side], values[division.rows[side]].numpy()) for division, values in zip(answers, logits, strict=True)]
        found[side] = {
            "accuracy": mean_of([measures.accuracy(values) for measures, values in of_side]),
            "auroc": mean_of([measures.auroc(values) for measures, values in of_side]),
        }
    return found
