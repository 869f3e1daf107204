"""Effect for side effect against loops over tokens and texts, and against the KL itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bad_neurons.errors import UserError
from bad_neurons.models.prompts import tokenize_text
from bad_neurons.selection.ways import scores_of
from bad_neurons.selection.ways.behaviour import behaviour_gradients
from bad_neurons.selection.ways.fisher import curvature_along, fisher_diagonal
from ways_by_hand import LAYERS, MATRICES, TEXTS, UNITS, drawn_log_prob, drawn_texts, owned, trainable, untouched


class OneWeightAPosition:
    """A linear map that has a copy of its weight for every position, so that autograd tells positions apart."""

    def __init__(self, linear, positions):
        self.linear = linear
        self.weights = linear.weight.detach().repeat(positions, 1, 1).requires_grad_(True)

    def __enter__(self):
        self.linear.forward = lambda x: torch.einsum("toi,bti->bto", self.weights, x)
        return self

    def __exit__(self, *_):
        del self.linear.forward


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_the_diagonal_is_a_sum_over_single_positions(material, family):
    given = material(family)
    found = fisher_diagonal(given)
    assert untouched(given.lm)
    assert set(found) == {(layer, matrix) for layer in LAYERS for matrix in MATRICES}
    texts = drawn_texts(given.lm)
    for at, linear in given.linears.items():
        total = torch.zeros_like(linear.weight)
        for ids, drawn in texts:
            with OneWeightAPosition(linear, len(ids)) as copies:
                drawn_log_prob(given.lm, ids, drawn).backward()
            total += sum(gradient.square() for gradient in copies.weights.grad)
        expected = total / sum(len(drawn) for _, drawn in texts)
        torch.testing.assert_close(found[at], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen3"])
@pytest.mark.parametrize("axis", UNITS)
def test_the_curvature_along_a_direction_is_a_sum_over_texts(material, family, axis):
    given = material(family, axis=axis)
    directions = {at: torch.randn_like(linear.weight) for at, linear in given.linears.items()}
    found = curvature_along(given, directions)
    assert untouched(given.lm)
    weights, texts = trainable(given.lm), drawn_texts(given.lm)
    expected = {layer: torch.zeros(given.units) for layer in LAYERS}
    for ids, drawn in texts:
        given.lm.model.zero_grad()
        drawn_log_prob(given.lm, ids, drawn).backward()
        along = {at: weights[at].grad * D for at, D in directions.items()}
        for layer in LAYERS:
            expected[layer] += torch.stack([owned(along, axis, layer, unit).sum() for unit in range(given.units)]).square()
    for layer in LAYERS:
        expected[layer] /= sum(len(drawn) for _, drawn in texts)
        assert expected[layer].min() > 0
        torch.testing.assert_close(found[layer], expected[layer], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("axis", UNITS)
def test_scores_from_their_parts(material, axis):
    given = material(axis=axis, damping=0.3)
    G, diagonal = behaviour_gradients(given), fisher_diagonal(given)
    along = curvature_along(given, G)
    floor = 0.3 * torch.cat([f.flatten() for f in diagonal.values()]).mean()
    worth = {at: G[at] ** 2 / (diagonal[at] + floor) for at in G}
    by_weight, by_step = scores_of(given, "fisher"), scores_of(given, "fisher_step")
    lengths = {layer: torch.stack([owned(G, axis, layer, unit).square().sum() for unit in range(given.units)]) for layer in LAYERS}
    step_floor = 0.3 * torch.cat([along[layer] / lengths[layer] for layer in LAYERS]).mean()
    for layer in LAYERS:
        expected = torch.stack([owned(worth, axis, layer, unit).sum() for unit in range(given.units)])
        torch.testing.assert_close(by_weight[layer], expected, rtol=1e-4, atol=0)
        expected = lengths[layer] ** 2 / (along[layer] + step_floor * lengths[layer])
        torch.testing.assert_close(by_step[layer], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("axis", ["residual", "intermediate"])
def test_the_curvature_is_that_of_the_kl(material, axis):
    given = material(axis=axis, texts=TEXTS * 200)  # many draws: 600 squares have a mean of about 7 % standard error
    G = behaviour_gradients(given)
    curvature = curvature_along(given, G)
    weights, texts = trainable(given.lm), [torch.tensor([tokenize_text(given.lm.tokenizer, text)]) for text in TEXTS]

    def log_probs():
        return torch.cat([given.lm.model(input_ids=ids).logits[0, :-1].log_softmax(-1) for ids in texts]).double()

    with torch.no_grad():
        clean = log_probs()
        for layer in LAYERS:
            for unit in curvature[layer].topk(3).indices.tolist():
                kl, step = [], 0.01 / curvature[layer][unit].sqrt()
                for move in (step, -2 * step, step):  # on both sides, which takes the third order out, and back
                    for matrix in MATRICES:
                        rows = (matrix == "down_proj") == (axis == "residual")
                        at = (unit, slice(None)) if rows else (slice(None), unit)
                        weights[layer, matrix][at] += move * G[layer, matrix][at]
                    kl.append(float(F.kl_div(log_probs(), clean, reduction="sum", log_target=True)) / len(clean))
                assert kl[2] < kl[0] / 1000
                assert (kl[0] + kl[1]) / float(step) ** 2 == pytest.approx(float(curvature[layer][unit]), rel=0.2), (layer, unit)


@pytest.mark.parametrize("way", ["fisher", "fisher_step"])
def test_the_seed_draws_the_tokens(material, way):
    one, same, other = (scores_of(material(seed=seed), way) for seed in (3, 3, 4))
    for layer in LAYERS:
        assert torch.equal(one[layer], same[layer])
        assert not torch.allclose(one[layer], other[layer], rtol=1e-3)


def test_damping_takes_the_curvature_out(material):
    """With much damping every curvature is the same, and the scores are proportional to the squared gradient."""
    gradient, heavy = scores_of(material(), "gradient"), {way: scores_of(material(damping=1e5), way) for way in ("fisher", "fisher_step")}
    for scores in heavy.values():
        ratio = torch.cat([scores[layer] / gradient[layer].square() for layer in LAYERS])
        assert ratio.max() / ratio.min() < 1.01


def test_what_is_lacking_is_named(material):
    with pytest.raises(UserError, match="--text: way fisher weighs side effects on unrelated text; give a source"):
        scores_of(material(texts=[]), "fisher")
    with pytest.raises(UserError, match="--records: way fisher_step reads training records"):
        scores_of(material(records=[]), "fisher_step")
    with pytest.raises(UserError, match=r"--damping 0: above 0, such as 0\.01"):
        material(damping=0)
