"""By contrast: how far a unit's activation differs between agreeing and disagreeing answers.

Contrastive neuron attribution (arXiv 2605.12290, section 3) ranks the inputs of ``down_proj`` by the absolute difference of
their means over two sets of prompts, and then strikes out units that are loud whatever is read. Here the two sets are the two
positions of each record behind one prompt, and the difference is divided by its spread instead, which quiets such units
without a second data set and a threshold: with a_r and b_r a unit's mean activations over the words of the agreeing and the
disagreeing position of record r,

    score = |mean_r(a_r - b_r)| / std_r(a_r - b_r)

What a unit writes (the norm of its column of ``down_proj``) does not enter, as it does not there. A unit of several numbers
(an attention head) has the norm of the mean over the root of the summed variances.

Legend: n numbers that are read of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bad_neurons.errors import UserError
from bad_neurons.models.answer_means import answer_means
from bad_neurons.models.prompts import tokenize
from bad_neurons.selection.ways.material import Material


def contrast_scores(material: Material) -> dict[int, Tensor]:
    """Standardised mean difference of each unit."""
    if len(material.records) < 2:
        raise UserError("--records: the way contrast needs two training records or more, for a mean and a spread")
    return {layer: _standardised(means[0::2] - means[1::2], material.units) for layer, means in _means(material).items()}


def _standardised(differences: Tensor, units: int) -> Tensor:
    """Scores [units] from differences [records, n]; 0 for a unit that never differs."""
    variance, mean = torch.var_mean(differences.double(), dim=0)
    spread, size = (values.view(units, -1).sum(1).sqrt() for values in (variance, mean.square()))
    return torch.where(spread > 0, size / spread, 0.0).float()


def _means(material: Material) -> dict[int, Tensor]:
    """Mean activation [2 * records, n] over the words of each position of each record, agreeing first."""
    ids = [tokenize(material.lm.tokenizer, r.prompt, answer) for r in material.records for answer in r.scored]
    points, inputs = _points(material)
    return answer_means(material.view, ids, points, inputs=inputs, max_tokens=material.max_tokens, what="contrast")


def _points(material: Material) -> tuple[dict[int, nn.Module], bool]:
    """Where units are read, and whether they are what the module takes: what the MLP adds, or the input of the map they write with."""
    if material.axis == "residual":
        return {layer: material.view.layers[layer].sae_point for layer in material.layers}, False
    return {layer: material.linears[layer, matrix] for (layer, matrix), part in material.parts.items() if not part.rows}, True
