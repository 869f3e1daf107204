"""Probes of a comparison against fits to the features themselves and against ``LinearProbe``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from bad_neurons.probe.divide import Answers
from bad_neurons.probe.fits import best_probes, layer_sets
from bad_neurons.probe.measures import Measures, topic_counts
from bad_neurons.probe.module import LinearProbe
from logistic import reference, sparse

pytestmark = [  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]

N = 240
PENALTIES = [1.0, 1e-2, 0.1]


def division(bounds, order=None):
    """Answers whose sides lie behind each other, from one bound to the next; each has topics of three answers."""
    sides, order = ("train", "in_domain", "validation", "test"), torch.arange(N) if order is None else order
    rows = {side: order[a:b] for side, a, b in zip(sides, bounds[:-1], bounds[1:], strict=True)}
    return Answers(rows, {side: Measures((Y[at] > 0).numpy(), at.numpy() // 3, topic_counts(N // 3)) for side, at in rows.items()})


X = {3: sparse(N, 30, 0).double(), 5: sparse(N, 12, 1, 4).double()}
_signal = X[3][:, :4].mean(1) + X[5][:, :3].mean(1) - X[3][:, 4:9].mean(1)
Y = (torch.rand(N, generator=torch.Generator().manual_seed(2)) < ((_signal - _signal.median()) / _signal.std()).sigmoid()).float()
BOUNDS = [0, 120, 150, 190, N]


def refitted(layers, l2, rows, at):
    """Log-odds of answers ``at`` by a fit to the features of the layers themselves."""
    x = torch.cat([X[layer] for layer in layers], 1)
    w, bias = reference(x[rows], Y[rows].double(), l2)
    return x[at] / x[rows].square().mean().sqrt() @ w + bias


def test_all_layers_and_each_alone():
    assert layer_sets([4, 7]) == [(4, 7), (4,), (7,)]
    assert layer_sets([4]) == [(4,)]


def test_each_is_the_best_of_refits_by_validation():
    answers = division(BOUNDS)
    fitted = best_probes(X.__getitem__, [3, 5], Y, [answers], PENALTIES)
    assert [fit.layers for fit in fitted] == [(3, 5), (3,), (5,)]
    at, train = answers.rows, answers.rows["train"]
    for fit in fitted:
        refits = {l2: refitted(fit.layers, l2, train, torch.arange(N)) for l2 in PENALTIES}
        aurocs = {l2: float(binary_auroc(logits[at["validation"]], Y[at["validation"]].int())) for l2, logits in refits.items()}
        assert fit.l2 == max(aurocs, key=aurocs.__getitem__)
        assert len(set(aurocs.values())) > 1
        for side, rows in at.items():
            logits, y = refits[fit.l2][rows], Y[rows]
            assert fit.scores[side]["auroc"].value == pytest.approx(float(binary_auroc(logits, y.int())), abs=1e-6), side
            assert fit.scores[side]["accuracy"].value == pytest.approx(float(((logits > 0) == (y > 0)).double().mean())), side
            assert fit.scores[side]["auroc"].draws.shape == (2000,)


def test_figures_are_those_of_the_probe_stage(trainer, given_features, tmp_path):
    """``bad-neurons probe fit`` with the same penalty writes the same accuracy and AUROC of each side."""
    answers = division(BOUNDS)
    x = torch.cat([X[3], X[5]], 1).float()
    sides = {side: (x[answers.rows[side]], Y[answers.rows[side]]) for side in ("train", "validation", "test")}
    module = LinearProbe(str(tmp_path), l2=0.1)
    trainer().fit(module, given_features(sides, [3, 5], [30, 12]))
    together = best_probes(X.__getitem__, [3, 5], Y, [answers], [0.1])[0]
    for side, name in (("train", "fit"), ("validation", "validation"), ("test", "test")):
        for measure in ("accuracy", "auroc"):
            assert together.scores[side][measure].value == pytest.approx(module.results[name][measure], abs=1e-3), (side, measure)


def test_several_divisions_are_averaged():
    """One penalty for all of them, by the sum of their validation AUROCs."""
    mixed = torch.randperm(N // 3, generator=torch.Generator().manual_seed(1))
    order = (mixed[:, None] * 3 + torch.arange(3)).flatten()
    divisions = [division(BOUNDS), division(BOUNDS, order)]
    alone = {l2: [best_probes(X.__getitem__, [5], Y, [each], [l2])[0] for each in divisions] for l2 in PENALTIES}
    both = best_probes(X.__getitem__, [5], Y, divisions, PENALTIES)[0]
    validation = {l2: sum(fit.scores["validation"]["auroc"].value for fit in fits) for l2, fits in alone.items()}
    assert both.l2 == max(validation, key=validation.__getitem__)
    one, other = (fit.scores["test"]["auroc"] for fit in alone[both.l2])
    assert one.value != other.value
    assert both.scores["test"]["auroc"].value == pytest.approx((one.value + other.value) / 2)
    np.testing.assert_allclose(both.scores["test"]["auroc"].draws, (one.draws + other.draws) / 2, atol=1e-9)


def test_the_test_side_decides_nothing():
    """Other features and labels there change no penalty and no other figure."""
    answers = division(BOUNDS)
    rows = answers.rows["test"]
    spoilt = {layer: x.clone() for layer, x in X.items()}
    for x in spoilt.values():
        x[rows] = x[rows].flip(0)
    as_it_is = best_probes(X.__getitem__, [3, 5], Y, [answers], PENALTIES)
    changed = best_probes(spoilt.__getitem__, [3, 5], Y, [answers], PENALTIES)
    assert [fit.l2 for fit in changed] == [fit.l2 for fit in as_it_is]
    for one, other in zip(as_it_is, changed, strict=True):
        assert one.scores["test"]["auroc"].value != other.scores["test"]["auroc"].value
        for side in ("train", "in_domain", "validation"):
            assert one.scores[side]["auroc"].value == other.scores[side]["auroc"].value


def test_progress_is_told_of_each_fit():
    fits = []
    best_probes(X.__getitem__, [3, 5], Y, [division(BOUNDS)] * 2, PENALTIES, lambda: fits.append(1))
    assert len(fits) == 3 * 2 * len(PENALTIES)
