"""Greedy selection of layers on Gram matrices against refitting the probe on the features themselves."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from bad_neurons.errors import UserError
from bad_neurons.probe.choose import choose_layers
from bad_neurons.probe.gram import DualLogistic, gram, mean_square, validation_logits
from bad_neurons.probe.layers import select_layers, validation_scores
from bad_neurons.probe.module import LinearProbe
from helpers import write_records

L2 = 0.05


@pytest.fixture
def sides():
    """Features of four layers, 70 training and 50 validation examples; layers 2 and 5 know the label, 1 and 7 do not."""
    generator = torch.Generator().manual_seed(4)
    y = (torch.rand(120, generator=generator) < 0.4).double()
    layers = {}
    for layer, (width, pull) in {1: (9, 0.0), 2: (12, 0.9), 5: (7, 0.8), 7: (15, 0.0)}.items():
        x = 1.5 + torch.randn(120, width, generator=generator, dtype=torch.float64)
        x[:, layer % 3] += pull * (2 * y - 1)
        layers[layer] = x * (1 + layer)
    return {k: v[:70] for k, v in layers.items()}, {k: v[70:] for k, v in layers.items()}, y[:70], y[70:]


def refit(train, held_out, y, chosen):
    """Validation log-odds of a probe on ``chosen``, fitted to the features themselves in float64 (L-BFGS to the end)."""
    x, v = (torch.cat([side[layer] for layer in chosen], 1) for side in (train, held_out))
    scale = x.square().mean().sqrt()
    w, b = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits((x / scale) @ w + b, y) + 0.5 * L2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((v / scale) @ w + b).detach(), (w / scale).detach()


@pytest.mark.parametrize("chosen", [[2], [1, 5], [1, 2, 5, 7]])
def test_the_dual_fit_is_the_refit(sides, chosen):
    train, held_out, y, _ = sides
    grams = [gram(train[layer], held_out[layer]) for layer in chosen]
    fit = DualLogistic(y, L2).fit(grams)
    logits, weights = refit(train, held_out, y, chosen)
    torch.testing.assert_close(validation_logits(fit, grams), logits, rtol=1e-4, atol=1e-4)
    x = torch.cat([train[layer] for layer in chosen], 1)
    torch.testing.assert_close((x - x.mean(0)).T @ fit.alpha / mean_square(grams), weights, rtol=1e-3, atol=1e-5)
    assert float(fit.alpha.sum()) == pytest.approx(0.0, abs=1e-5)


def test_the_dual_fit_is_linear_probe(given_features, trainer, features, tmp_path):
    probe = LinearProbe(str(tmp_path), l2=L2)
    data = given_features(features, [3, 8], [5, 3])
    trainer().fit(probe, datamodule=data)
    (train, y), (held_out, _) = features["train"], features["validation"]
    grams = [gram(train[:, part].double(), held_out[:, part].double()) for part in (slice(0, 5), slice(5, 8))]
    found = validation_logits(DualLogistic(y, L2).fit(grams), grams)
    assert isinstance(probe, L.LightningModule)
    torch.testing.assert_close(found.float(), probe(held_out).detach(), rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("score", ["auroc", "log_loss"])
def test_greedy_is_greedy_by_refitting(sides, score):
    train, held_out, y, y_held_out = sides
    found = select_layers(*sides, l2=L2, budget=4, score=score)

    def value(chosen):
        scores = validation_scores(refit(train, held_out, y, sorted(chosen))[0], y_held_out)
        return -scores.log_loss if score == "log_loss" else scores.auroc

    taken: list[int] = []
    best = float("-inf")
    for step in found.steps:
        values = {layer: value([*taken, layer]) for layer in train if layer not in taken}
        for layer, scores in step.candidates.items():
            mine = -scores.log_loss if score == "log_loss" else scores.auroc
            assert mine == pytest.approx(values[layer], abs=2e-3)
        assert step.layer == max(values, key=lambda layer: values[layer])
        assert step.taken == (values[step.layer] > best) or len(taken) == 0
        if step.taken:
            taken, best = [*taken, step.layer], values[step.layer]
    assert found.order == taken
    assert set(found.order[:2]) == {2, 5}  # those that know the label come first


def test_budget_and_what_is_refused(sides):
    assert len(select_layers(*sides, l2=L2, budget=1).order) == 1
    assert len(select_layers(*sides, l2=L2).order) <= 1  # a third of four
    for options, said in (({"l2": 0.0}, "--l2 0.0: above 0"), ({"l2": L2, "budget": 5}, "--budget 5: 1 to 4")):
        with pytest.raises(UserError, match=said):
            select_layers(*sides, **options)
    with pytest.raises(UserError, match="answers of both kinds"):
        select_layers(sides[0], sides[1], torch.ones(70), sides[3], l2=L2)


def test_scores_by_hand():
    scores = validation_scores(torch.tensor([2.0, -1.0, 0.5, 0.5]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert (scores.auroc, scores.accuracy) == (3.5 / 4, 0.75)  # one pair of four is tied


def test_the_command_writes_what_it_found(tiny_folder, tmp_path):
    found = choose_layers(
        tiny_folder(), features="residual", folder=str(tmp_path / "features"), out=str(tmp_path), l2=0.1, budget=2,
        records=write_records(tmp_path / "records.jsonl", per_topic=6), dtype="float32",
    )  # fmt: skip
    content = json.loads((tmp_path / "layers.json").read_text())
    assert content["candidates"] == [0, 1, 2, 3]
    assert content["order"] == found.order
    assert content["chosen"] == sorted(found.order)
    assert len(content["curve"]) == len(found.steps) + 1
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"--layers: \[9\]: this model has layers 0 to 3"):
        choose_layers(tiny_folder(), [1, 9], features="residual", folder=str(tmp_path / "other"), out=str(tmp_path / "no"), dtype="float32")
