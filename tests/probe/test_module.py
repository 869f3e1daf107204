"""The probe against scipy's optimum of the same objective, its numbers by hand, and its file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bad_neurons.artifacts import read_json, write_tensors
from bad_neurons.errors import UserError
from bad_neurons.formats import PROBE_METRICS
from bad_neurons.probe.module import LinearProbe, read_probe, write_probe

LAYERS, WIDTHS, L2 = [2, 5], [5, 3], 1e-2

pytestmark = [  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]


@pytest.fixture
def fit(tmp_path, trainer, features, given_features):
    """``fit(sides, name)``: a probe fitted to the sides (those of ``features``), its files below ``tmp_path / name``."""

    def fitted(sides=features, name="probe"):
        module = LinearProbe(str(tmp_path / name), l2=L2)
        trainer().fit(module, given_features(sides, LAYERS, WIDTHS))
        return module

    return fitted


def root_mean_square(x):
    return math.sqrt((np.asarray(x, dtype=np.float64) ** 2).mean())


def objective(parameters, x, y):
    """Mean negative log-likelihood with the penalty, and its gradient; ``x`` scaled, labels -1 and 1 in the logistic loss."""
    w, bias = parameters[:-1], parameters[-1]
    sign = 2 * y - 1
    margin = sign * (x @ w + bias)
    pull = -sign / (1 + np.exp(margin)) / len(y)
    return np.logaddexp(0, -margin).mean() + L2 / 2 * (w @ w), np.append(x.T @ pull + L2 * w, pull.sum())


def test_weights_are_the_optimum_that_scipy_finds(fit, features):
    optimize = pytest.importorskip("scipy.optimize")
    module = fit()
    x, y = (np.asarray(part, dtype=np.float64) for part in features["train"])
    scale = root_mean_square(x)
    best = optimize.minimize(objective, np.zeros(9), (x / scale, y), jac=True, method="BFGS", options={"gtol": 1e-9})
    mine = np.append(module.weight.detach().numpy(), module.bias.item())
    np.testing.assert_allclose(mine, best.x, atol=2e-3)
    value, gradient = objective(mine.astype(np.float64), x / scale, y)
    assert value - best.fun < 1e-6
    assert np.abs(gradient).max() < 1e-4
    assert np.abs(objective(np.zeros(9), x / scale, y)[1]).max() > 0.05


def test_raw_weights_give_the_same_log_odds(fit, features):
    module = fit()
    x = features["test"][0]
    raw = module.raw_weights()
    assert {layer: tuple(w.shape) for layer, w in raw.items()} == {2: (5,), 5: (3,)}
    by_hand = x[:, :5] @ raw[2] + x[:, 5:] @ raw[5] + module.bias
    torch.testing.assert_close(module(x), by_hand, rtol=1e-4, atol=1e-4)
    scale = root_mean_square(features["train"][0])
    assert abs(scale - 1) > 0.5
    torch.testing.assert_close(torch.cat([raw[2], raw[5]]) * scale, module.weight.detach())


def test_a_louder_model_gets_smaller_weights_and_the_same_log_odds(fit, features):
    """``l2`` means the same for both, so the fit is the same up to the unit of the features."""
    one, louder = fit(), fit({side: (x * 64, y) for side, (x, y) in features.items()}, "louder")
    for layer in LAYERS:
        torch.testing.assert_close(louder.raw_weights()[layer] * 64, one.raw_weights()[layer], rtol=1e-5, atol=1e-6)
    x = features["test"][0]
    torch.testing.assert_close(louder(x * 64), one(x), rtol=1e-4, atol=1e-4)


def test_the_file_gives_back_what_was_fitted(fit):
    module = fit()
    probe = read_probe(module.out / "probe.safetensors")
    assert list(probe.weights) == LAYERS
    assert all(probe.weights[layer].equal(module.raw_weights()[layer]) for layer in LAYERS)
    assert probe.bias == module.bias.item()
    assert probe.origin == {
        "model": {"id": "model", "digest": "0123"}, "features": "sae", "layers": LAYERS, "widths": WIDTHS, "pool": "max",
        "tokens": "answer", "sae": "runs/sae", "sae_digests": {},
    }  # fmt: skip
    stored = read_json(module.out / "metrics.json", PROBE_METRICS)
    assert stored == {
        "format": PROBE_METRICS,
        **probe.origin,
        "l2": L2,
        **{side: module.results[side] for side in ("fit", "validation", "test")},
    }


def test_another_file_is_refused(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"bias": torch.zeros(())}, {"format": "bad-neurons/delta/1"})
    with pytest.raises(UserError, match=r"other.safetensors: format 'bad-neurons/delta/1'; expected 'bad-neurons/probe/2'"):
        read_probe(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"none.safetensors: cannot be read as bad-neurons/probe/2"):
        read_probe(tmp_path / "none.safetensors")


def test_metrics_by_hand(tmp_path, trainer, given_features):
    """One feature as log-odds: -3 -2 -1 1 3 with labels 0 0 1 0 1."""
    sides = {
        "train": (torch.tensor([[3.0], [-4.0]]), torch.tensor([0.0, 1.0])),
        "validation": (torch.tensor([[-2.0], [-1.0], [1.0], [3.0], [-3.0]]), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])),
        "test": (torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 0.0])),
    }
    data = given_features(sides, [4], [1])
    write_probe(tmp_path / "probe.safetensors", {4: torch.ones(1)}, 0.0, data.origin())
    module = LinearProbe(str(tmp_path))
    trainer().validate(module, data, verbose=False)
    sigmoid = {z: 1 / (1 + math.exp(-z)) for z in (-3, -2, -1, 1, 3)}  # each alone in its tenth
    errors = [sigmoid[-3], sigmoid[-2], 1 - sigmoid[-1], sigmoid[1], 1 - sigmoid[3]]
    expected = {"accuracy": 3 / 5, "auroc": 5 / 6, "calibration_error": sum(errors) / 5, "majority": 3 / 5, "examples": 5}
    assert module.results == {"validation": pytest.approx(expected, abs=1e-5)}
    trainer().test(module, data, verbose=False)
    assert module.results["test"] == pytest.approx(
        {"accuracy": 0.5, "auroc": 0.5, "calibration_error": sigmoid[1] - 0.5, "majority": 0.5, "examples": 2}, abs=1e-5
    )


def test_a_saved_probe_validates_as_it_did_when_it_was_fitted(fit, features, given_features, trainer):
    module = fit()
    assert module.results["validation"]["accuracy"] > module.results["validation"]["majority"]
    again = LinearProbe(str(module.out))
    trainer().validate(again, given_features(features, LAYERS, WIDTHS), verbose=False)
    assert again.results["validation"] == pytest.approx(module.results["validation"], abs=1e-6)


@pytest.mark.parametrize(
    ("layers", "widths", "said"),
    [
        ([2, 6], [5, 3], r"trained on layers \[2, 5\], but the data has \[2, 6\]"),
        ([2, 5], [3, 5], r"trained on widths \[5, 3\], but the data has \[3, 5\]"),
    ],
)
def test_a_saved_probe_of_other_layers_is_refused(fit, features, given_features, trainer, layers, widths, said):
    module = fit()
    with pytest.raises(UserError, match=said):
        trainer().validate(LinearProbe(str(module.out)), given_features(features, layers, widths), verbose=False)


def test_without_a_saved_probe_there_is_nothing_to_validate(features, given_features, trainer, tmp_path):
    with pytest.raises(UserError, match=r"probe.safetensors: cannot be read as bad-neurons/probe/2"):
        trainer().validate(LinearProbe(str(tmp_path)), given_features(features, LAYERS, WIDTHS), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_validating_keeps_the_numbers_of_the_fit(fit, features, given_features, trainer):
    module = fit()
    trainer().test(LinearProbe(str(module.out)), given_features(features, LAYERS, WIDTHS), verbose=False)
    stored = read_json(module.out / "metrics.json", PROBE_METRICS)
    assert stored["fit"] == module.results["fit"]
    assert stored["validation"] == module.results["validation"]
    assert stored["test"]["examples"] == 30


def test_a_fit_replaces_the_metrics_of_an_older_version(fit, tmp_path):
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "metrics.json").write_text('{"fit": {"accuracy": 2.0}}', encoding="utf-8")
    module = fit()
    assert read_json(module.out / "metrics.json", PROBE_METRICS)["fit"] == module.results["fit"]


def test_a_negative_penalty_is_refused():
    with pytest.raises(UserError, match=r"--model.l2 -1: at least 0"):
        LinearProbe(l2=-1)
