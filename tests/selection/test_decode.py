"""Probe weights to neuron scores, by hand."""

from __future__ import annotations

import torch

from bad_neurons.models.view import view_decoder
from bad_neurons.selection.decode import decoded_direction, intermediate_scores, residual_scores
from bad_neurons.selection.ways.probe import neuron_scores
from bad_neurons.testing import tiny_model

W_DEC = torch.tensor([[1.0, 0.0, 2.0], [0.0, -3.0, 1.0]])  # F = 2 features, d = 3
V = torch.tensor([2.0, 3.0, 3.0])  # 2 * row 0 - 1 * row 1


def test_decoded_direction():
    assert torch.equal(decoded_direction(W_DEC, torch.tensor([2.0, -1.0])), V)


def test_scores_on_the_residual_axis():
    assert residual_scores(torch.tensor([2.0, -3.0, 0.0])).tolist() == [2.0, 3.0, 0.0]


def test_scores_on_the_intermediate_axis():
    down = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, -1.0], [0.0, 0.0, 1.0, -1.0]])  # [d 3, m 4]
    # v * gain = (2, 6, -3); the last neuron writes 2 - 6 + 3 = -1
    assert intermediate_scores(V, torch.tensor([1.0, 2.0, -1.0]), down).tolist() == [2.0, 6.0, 3.0, 1.0]
    assert intermediate_scores(V, torch.ones(3), down).tolist() == [2.0, 3.0, 3.0, 4.0]


def test_scores_of_a_model_follow_what_a_neuron_really_writes(family):
    # The score of neuron j is |v . (what unit activation of j adds to the residual stream)|, up to the norm's scale,
    # which is common to all neurons only where there is a gain and no norm: so compare without it, norm by norm.
    view = view_decoder(tiny_model(family))
    v = torch.randn(16)
    part = view.layers[2]
    scores = neuron_scores(view, {2: v}, "intermediate")[2]
    for j in (0, 11, 23):
        written = part.matrix("down_proj")(torch.eye(24)[j])
        if part.sae_point is not part.mlp:  # the norm divides by the root mean square, which is put back
            written = part.sae_point(written) * (written.pow(2).mean() + 1e-6).sqrt()
        torch.testing.assert_close(scores[j], (v @ written).abs().detach(), rtol=1e-4, atol=1e-5)


def test_axes_of_a_model():
    view = view_decoder(tiny_model("gemma2"))
    directions = {1: -torch.ones(16), 3: torch.arange(16.0)}
    residual, intermediate = (neuron_scores(view, directions, axis) for axis in ("residual", "intermediate"))
    assert torch.equal(residual[1], torch.ones(16))
    assert torch.equal(residual[3], torch.arange(16.0))
    assert {layer: len(s) for layer, s in intermediate.items()} == {1: 24, 3: 24}
