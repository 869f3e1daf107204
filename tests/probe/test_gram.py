"""Gram matrices against products by numpy, and the fit on them against fits to the features themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bad_neurons.errors import UserError
from bad_neurons.probe.gram import DualLogistic, gram, mean_square, side_by_side, validation_logits
from bad_neurons.probe.module import LinearProbe
from logistic import reference, sparse

pytestmark = [  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]


def labels(x, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = x[:, :4].mean(1) - x[:, 4:8].mean(1)
    return (torch.rand(len(x), generator=generator) < ((logits - logits.median()) / logits.std()).sigmoid()).double()


@pytest.mark.parametrize(("n", "width"), [(7, 3), (64, 5), (100, 1100)])
def test_products_of_centred_features(n, width):
    x, held_out = sparse(n, width, 0).double(), sparse(9, width, 1).double()
    found = gram(x, held_out)
    a, b = x.numpy(), held_out.numpy()
    centre = a.mean(0)
    np.testing.assert_allclose(found.train, (a - centre) @ (a - centre).T, rtol=1e-10, atol=1e-8)
    np.testing.assert_allclose(found.validation, (b - centre) @ (a - centre).T, rtol=1e-10, atol=1e-8)
    assert found.train.equal(found.train.T)
    assert found.squares == pytest.approx((a**2).sum())
    assert found.width == width


def test_float32_products_are_those_of_float64_to_rounding():
    x, held_out = sparse(50, 1500, 0), sparse(20, 1500, 1)
    single, double = gram(x, held_out), gram(x.double(), held_out.double())
    assert single.train.dtype == torch.float32
    largest = float(double.train.abs().max())
    assert float((single.train - double.train).abs().max()) < 2e-6 * largest
    assert float((single.validation - double.validation).abs().max()) < 2e-6 * largest
    assert single.squares == pytest.approx(double.squares, rel=1e-6)


def test_layers_side_by_side_are_the_sum():
    one, other = [(sparse(40, width, seed).double(), sparse(15, width, seed + 9).double()) for width, seed in ((6, 0), (11, 1))]
    both = gram(torch.cat([one[0], other[0]], 1), torch.cat([one[1], other[1]], 1))
    summed = side_by_side(gram(*one), gram(*other))
    assert not torch.allclose(both.train, gram(*one).train)
    torch.testing.assert_close(summed.train, both.train)
    torch.testing.assert_close(summed.validation, both.validation)
    assert (summed.width, summed.squares) == (17, pytest.approx(both.squares))
    scale = torch.cat([one[0], other[0]], 1).square().mean()
    assert mean_square([gram(*one), gram(*other)]) == pytest.approx(float(scale))


@pytest.mark.parametrize("l2", [1.0, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("width", [12, 300])
def test_weights_and_log_odds_are_those_of_a_fit_to_the_features(l2, width):
    """Of two layers of unequal loudness; with 300 features the examples are separable."""
    layers = [
        (sparse(120, width, 0).double(), sparse(50, width, 2).double()),
        (sparse(120, 9, 1, 5).double(), sparse(50, 9, 3, 5).double()),
    ]
    x, held_out = (torch.cat(parts, 1) for parts in zip(*layers, strict=True))
    y = labels(x)
    grams = [gram(*layer) for layer in layers]
    fit = DualLogistic(y, l2).fit(grams)
    scale = x.square().mean().sqrt()
    w, bias = reference(x, y, l2)
    assert w.norm() > 1e-2
    assert abs(float(fit.alpha.sum())) < 1e-9 * float(fit.alpha.abs().sum())
    torch.testing.assert_close(x.T @ fit.alpha / scale, w, rtol=1e-3, atol=2e-5 * float(w.abs().max()) / l2**0.5)
    torch.testing.assert_close(fit.logits, x / scale @ w + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(validation_logits(fit, grams), held_out / scale @ w + bias, rtol=1e-4, atol=1e-4)


def test_it_is_the_linear_probe_of_the_package(trainer, features, given_features, tmp_path):
    module = LinearProbe(str(tmp_path), l2=1e-2)
    trainer().fit(module, given_features(features, [2, 5], [5, 3]))
    (x, y), held_out = features["train"], features["validation"][0]
    grams = [gram(x[:, columns], held_out[:, columns]) for columns in (slice(0, 5), slice(5, 8))]
    fit = DualLogistic(y, 1e-2).fit(grams)
    scale = mean_square(grams) ** 0.5
    assert scale == pytest.approx(float(module.get_buffer("scale")), rel=1e-6)
    torch.testing.assert_close((x.T @ fit.alpha.float()) / scale, module.weight.detach(), rtol=0, atol=2e-3)
    torch.testing.assert_close(validation_logits(fit, grams).float(), module(held_out).detach(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("l2", [0.1, 1e-3])
def test_it_is_the_logistic_regression_of_scikit_learn(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, held_out = sparse(120, 200, 0).double(), sparse(50, 200, 1).double()
    y = labels(x)
    grams = [gram(x[:, :80], held_out[:, :80]), gram(x[:, 80:], held_out[:, 80:])]
    scale = float(x.square().mean().sqrt())
    model = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=100_000).fit(x.numpy() / scale, y.numpy())
    found = validation_logits(DualLogistic(y, l2).fit(grams), grams)
    np.testing.assert_allclose(found, model.decision_function(held_out.numpy() / scale), rtol=1e-4, atol=1e-4)


def test_the_start_changes_the_way_but_not_the_end():
    x, y = sparse(100, 150, 0).double(), labels(sparse(100, 150, 0).double())
    solver, grams = DualLogistic(y, 1e-2), [gram(x, x[:1])]
    cold = solver.fit(grams)
    for start in (20 * (2 * y - 1), 20 * (1 - 2 * y), torch.randn(100, dtype=torch.float64) * 5, cold.logits):
        torch.testing.assert_close(solver.fit(grams, start).logits, cold.logits, rtol=0, atol=1e-3)
    assert float((cold.logits - solver.base_rate).abs().max()) > 1


@pytest.mark.parametrize("l2", [1e-5, 1e-7])
def test_a_penalty_that_needs_double_precision(l2):
    x, y = sparse(60, 400, 0).double(), labels(sparse(60, 400, 0).double())
    fit = DualLogistic(y, l2).fit([gram(x, x[:1])])
    kernel = (x - x.mean(0)) @ (x - x.mean(0)).T / x.square().mean()
    p = (kernel @ fit.alpha + fit.bias).sigmoid()
    assert float((p - y).abs().max()) < 0.05
    torch.testing.assert_close(60 * l2 * fit.alpha, y - p, rtol=0, atol=2e-6)


def test_an_impossible_penalty_is_refused():
    x, y = sparse(60, 400, 0), labels(sparse(60, 400, 0))
    with pytest.raises(UserError, match=r"--l2 1e-18: too small for the probe"):
        DualLogistic(y, 1e-18).fit([gram(x, x[:1])])


def test_a_layer_of_zeros_has_the_base_rate():
    y = torch.tensor([0.0, 1.0, 1.0, 1.0])
    grams = [gram(torch.zeros(4, 3), torch.zeros(2, 3))]
    fit = DualLogistic(y, 0.1).fit(grams)
    np.testing.assert_allclose(validation_logits(fit, grams), [np.log(3)] * 2, atol=1e-5)
