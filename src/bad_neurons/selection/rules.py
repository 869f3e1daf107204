"""Rules that turn scores into a choice of neurons (DESIGN step 6).

A rule takes the scores by layer, one number, and counts by layer where it copies those of another choice; it gives the sorted
chosen indices by layer. To add one, write the function and name it in :data:`RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from bad_neurons.errors import UserError

Scores = Mapping[int, Tensor]
Chosen = dict[int, list[int]]
Counts = Mapping[int, int]
Rule = Literal["top_p", "top_fraction", "top_k_per_layer", "same_counts", "all"]

SHARES: tuple[Rule, ...] = ("top_p", "top_fraction")  # rules whose amount is a share


def top_p(scores: Scores, share: float, like: Counts | None = None) -> Chosen:
    """The smallest set over all layers together that holds a share of the sum of all scores, nucleus style."""
    flat = torch.cat([scores[layer] for layer in sorted(scores)]).double()
    ordered = flat.sort(descending=True, stable=True)
    held = ordered.values.cumsum(0)
    before = torch.cat([held.new_zeros(1), held[:-1]])
    count = int((before < share * held[-1]).sum())  # not flat.sum(): it rounds otherwise, and p = 1 would take zeros too
    return _by_layer(scores, ordered.indices[:count])


def top_fraction(scores: Scores, share: float, like: Counts | None = None) -> Chosen:
    """The best share of all neurons over all layers together (rounded, at least one)."""
    flat = torch.cat([scores[layer] for layer in sorted(scores)])
    count = max(1, round(share * len(flat)))
    return _by_layer(scores, flat.sort(descending=True, stable=True).indices[:count])


def top_k_per_layer(scores: Scores, k: float, like: Counts | None = None) -> Chosen:
    """The best k of each layer."""
    return {layer: _best(s, int(k)) for layer, s in sorted(scores.items())}


def same_counts(scores: Scores, amount: float, like: Counts | None = None) -> Chosen:
    """The best of each layer, as many as another choice has there.

    Raises:
        UserError: no other choice, or one with more neurons than a candidate layer has.
    """
    if not like:
        raise UserError("--like: rule same_counts copies the counts of another choice; give its neurons.json")
    for layer, count in like.items():
        if count > len(scores.get(layer, ())):
            here = f"has {len(scores[layer])} on this axis" if layer in scores else f"is not among the candidates {sorted(scores)}"
            raise UserError(f"--like: it has {count} neurons in layer {layer}, which {here}")
    return {layer: _best(scores[layer], count) for layer, count in sorted(like.items()) if count}


def everything(scores: Scores, amount: float, like: Counts | None = None) -> Chosen:
    """Every neuron of the candidate layers, whatever its score: whole MLPs."""
    return {layer: list(range(len(s))) for layer, s in sorted(scores.items())}


RULES: dict[Rule, Callable[[Scores, float, Counts | None], Chosen]] = {
    "top_p": top_p,
    "top_fraction": top_fraction,
    "top_k_per_layer": top_k_per_layer,
    "same_counts": same_counts,
    "all": everything,
}


def _best(scores: Tensor, count: int) -> list[int]:
    """Sorted indices of the best ``count`` scores; of equal ones the lower index."""
    return sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())


def _by_layer(scores: Scores, flat_indices: Tensor) -> Chosen:
    """Indices into the concatenation of all layers, back to sorted indices by layer; empty layers are left out."""
    chosen: Chosen = {}
    start = 0
    for layer in sorted(scores):
        here = flat_indices[(flat_indices >= start) & (flat_indices < start + len(scores[layer]))] - start
        if len(here):
            chosen[layer] = sorted(here.tolist())
        start += len(scores[layer])
    return chosen
