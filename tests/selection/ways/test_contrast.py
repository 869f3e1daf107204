"""Differences of activations against numpy on what hooks see, one answer at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bad_neurons.errors import UserError
from bad_neurons.models.prompts import tokenize
from bad_neurons.selection.ways import scores_of
from bad_neurons.selection.ways.contrast import _standardised
from ways_by_hand import LAYERS, RECORDS, UNITS, untouched


def activations(lm, layer, axis, turns, answer):
    """Mean, float64, of what is read of a layer over an answer's tokens: [d], [m] or [H * 8]."""
    ids = tokenize(lm.tokenizer, turns, answer)
    gemma = lm.model.config.model_type != "llama"
    names = {"residual": "post_feedforward_layernorm" if gemma else "mlp", "intermediate": "mlp.down_proj", "heads": "self_attn.o_proj"}
    module = next(m for path, m in lm.model.named_modules() if path.endswith(f"layers.{layer}.{names[axis]}"))
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output if axis == "residual" else args[0]))
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([ids.prompt + ids.answer]))
    handle.remove()
    return seen[0][0, len(ids.prompt) :].double().numpy().mean(0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
@pytest.mark.parametrize("axis", UNITS)
@pytest.mark.parametrize("max_tokens", [40, 2048])
def test_scores(material, family, axis, max_tokens):
    given = material(family, axis=axis, max_tokens=max_tokens)
    scores = scores_of(given, "contrast")
    assert untouched(given.lm)
    assert list(scores) == LAYERS
    for layer in LAYERS:
        sides = [[activations(given.lm, layer, axis, r.prompt, answer) for answer in r.scored] for r in RECORDS]
        differences = np.array([agreeing - disagreeing for agreeing, disagreeing in sides])
        mean, variance = (values.reshape(UNITS[axis], -1).sum(1) for values in (differences.mean(0) ** 2, differences.var(0, ddof=1)))
        expected = np.sqrt(mean / variance)
        assert expected.min() > 0
        np.testing.assert_allclose(scores[layer].numpy(), expected, rtol=2e-3, atol=1e-5)


def test_by_hand():
    differences = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, -2.0]])
    # unit 0: mean 2, variance 2; unit 1 never differs; unit 2: mean 0
    assert _standardised(differences, 3).tolist() == [pytest.approx(2 / 2**0.5), 0.0, 0.0]
    # one unit of all three numbers: mean (2, 0, 0), variances 2 + 0 + 8
    assert _standardised(differences, 1).tolist() == [pytest.approx(2 / 10**0.5)]


def test_one_record_has_no_spread(material):
    with pytest.raises(UserError, match="--records: the way contrast needs two training records or more"):
        scores_of(material(records=RECORDS[:1]), "contrast")
