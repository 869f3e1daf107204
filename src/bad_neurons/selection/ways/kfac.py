"""By effect against side effect, with the curvature of whole rows and columns.

As in :mod:`bad_neurons.selection.ways.fisher` a set of weights is worth ``G . F^-1 G``: the largest effect for a given KL on
unrelated text. There F is cut down to its diagonal, though the inputs of a linear map are far from independent: directions that
text uses all the time are dear, others nearly free. Here F is that of K-FAC (arXiv 1503.05671), the second moment A of what a
map takes times the second moment S of the gradient by what it gives, and within it each owned row or column keeps all of its own
curvature:

- row i has the curvature ``S_ii A`` and is worth ``G_i . A^-1 G_i / S_ii``;
- column j has ``A_jj S`` and is worth ``G_j . S^-1 G_j / A_jj``.

It is the curvature by which the optimizer ``whitened`` measures its steps (:mod:`bad_neurons.tuning.whitening`), with the output's
side as well. Moments are means over all tokens but the first of each text, whose hidden states are unlike all others.
``damping`` times its mean is added to every diagonal; a side of more than 4,096 is taken by its diagonal alone.

Legend: B texts of a batch, T columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bad_neurons.selection.ways.behaviour import behaviour_gradients
from bad_neurons.selection.ways.fisher import each_text_batch
from bad_neurons.selection.ways.material import Material, Matrix
from bad_neurons.tuning.whitening import MAX_INPUTS


def kfac_scores(material: Material) -> dict[int, Tensor]:
    """``G_i . A^-1 G_i / S_ii`` over owned rows, ``G_j . S^-1 G_j / A_jj`` over owned columns."""
    gradients, moments = behaviour_gradients(material), kronecker_moments(material)
    worth: dict[Matrix, Tensor] = {}
    for at, G in gradients.items():
        A, S = (_damped(moment, material.damping) for moment in moments[at])
        worth[at] = G * _divided(_divided(G, S).T, A).T
    return {layer: score.clamp_min(0).cpu() for layer, score in material.by_unit(worth).items()}


def kronecker_moments(material: Material) -> dict[Matrix, tuple[Tensor, Tensor]]:
    """Second moments of what each map takes and of the gradient by what it gives, float32, means over tokens but the first.

    Of maps that units own rows of, [in, in] and [out] (its diagonal); of those that they own columns of, [in] and [out, out].
    """
    found: dict[Matrix, tuple[Tensor, Tensor]] = {}
    counts = dict.fromkeys(material.linears, 0)

    def add(at: Matrix, x: Tensor, g: Tensor) -> None:
        kept = g[:, 1:].ne(0).any(-1)  # padding and last tokens have no part in the log-probability
        counts[at] += int(kept.sum())
        rows = material.parts[at].rows
        new = _moment(x[:, 1:][kept], full=rows), _moment(g[:, 1:][kept], full=not rows)
        found[at] = (found[at][0] + new[0], found[at][1] + new[1]) if at in found else new

    for _ in each_text_batch(material, add):
        pass
    return {at: (A / max(counts[at], 1), S / max(counts[at], 1)) for at, (A, S) in found.items()}


def _moment(values: Tensor, full: bool) -> Tensor:
    return values.T @ values if full and values.shape[1] <= MAX_INPUTS else values.square().sum(0)


def _damped(moment: Tensor, damping: float) -> Tensor:
    """A moment, or its diagonal, with ``damping`` times the mean of its diagonal added to the diagonal."""
    if moment.dim() == 1:
        return moment + damping * moment.mean()
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)


def _divided(values: Tensor, moment: Tensor) -> Tensor:
    """``moment^-1 values`` for values [n, k] and a moment [n, n] or its diagonal [n]."""
    return values / moment[:, None] if moment.dim() == 1 else torch.cholesky_solve(values, torch.linalg.cholesky(moment))
