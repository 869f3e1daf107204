"""Means over answers, against hooks of this test alone and one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.models.answer_means import answer_means
from bad_neurons.models.prompts import Tokenized
from bad_neurons.models.view import view_decoder
from bad_neurons.testing import tiny_model

IDS = [
    Tokenized([2, 10, 11, 12, 13, 14, 15, 16, 17, 18], [30]),
    Tokenized([2, 10, 11, 12, 13, 14, 15, 16, 17, 18], [30, 31, 32]),  # shares the prompt and begins alike
    Tokenized([2, 40], [30, 31]),
]


@pytest.mark.parametrize("max_tokens", [1, 1000])
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("point", ["layer", "down_proj", "o_proj"])
def test_means(family, point, inputs, max_tokens):
    model = tiny_model(family)
    view = view_decoder(model)
    points = {layer: view.layers[layer].layer if point == "layer" else view.layers[layer].matrix(point) for layer in (3, 1)}
    found = answer_means(view, IDS, points, inputs=inputs, max_tokens=max_tokens, what="test")
    assert sorted(found) == [1, 3]
    assert not any(m._forward_hooks for m in model.modules())
    seen = {}
    for layer, module in points.items():
        module.register_forward_hook(lambda _m, args, output, layer=layer: seen.update({layer: args[0] if inputs else output}))
    for number, ids in enumerate(IDS):
        with torch.no_grad():
            model(input_ids=torch.tensor([ids.prompt + ids.answer]))
        for layer in points:
            expected = seen[layer][0, len(ids.prompt) :].mean(0)
            torch.testing.assert_close(found[layer][number], expected, rtol=1e-4, atol=1e-4)
