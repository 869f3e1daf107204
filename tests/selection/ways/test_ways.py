"""What holds for every way, and the ways that need no pass through the model."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from bad_neurons.errors import UserError
from bad_neurons.probe.module import Probe
from bad_neurons.report.html import _WAYS as NAMED
from bad_neurons.selection.select import choose
from bad_neurons.selection.ways import READS, WAYS, Material, WayName, scores_of
from ways_by_hand import LAYERS

PROBE = Probe({layer: torch.linspace(-1, 1, 16) for layer in (0, 1, 3)}, 0.0, {"features": "residual"})


def test_every_way_is_listed():
    assert set(WAYS) == set(READS) == set(get_args(WayName)) == set(NAMED)


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"heads"}))
@pytest.mark.parametrize("axis", ["residual", "intermediate"])
def test_scores_of_every_way(material, way, axis):
    given = material("qwen3", axis=axis, probe=PROBE)
    scores, again = scores_of(given, way), scores_of(given, way)
    assert list(scores) == LAYERS
    for layer, values in scores.items():
        assert (values.shape, values.dtype, values.device.type) == ((16 if axis == "residual" else 24,), torch.float32, "cpu")
        assert values.min() >= 0
        assert len(values.unique()) >= 8
        assert torch.equal(values, again[layer])
    chosen = choose(scores, "top_fraction", 0.25, given.lm, axis)
    assert (chosen.count, chosen.candidates, chosen.size) == (len(LAYERS) * chosen.size // 4, LAYERS, len(scores[1]))


def test_random_depends_on_the_seed_alone(material):
    def of(**changes):
        return scores_of(material(**changes), "random")

    assert torch.equal(of(seed=3)[3], of(seed=3, records=(), texts=())[3])
    assert not torch.equal(of(seed=3)[3], of(seed=4)[3])
    assert not torch.equal(of(seed=3)[1], of(seed=3)[3])


def test_random_choices_fall_on_layers_and_units_alike(material):
    first = material()
    given = [replace(first, seed=seed) for seed in range(60)]
    chosen = [choose(scores_of(one, "random"), "top_fraction", 0.5, one.lm, "intermediate").layers for one in given]
    counts = torch.tensor([[len(layers.get(layer, ())) for layer in LAYERS] for layers in chosen]).double()
    assert (counts.sum(1) == 24).all()
    # hypergeometric: 24 of 48, mean 12 a layer, standard deviation 1.75 a draw and 0.23 of the mean of 60
    assert abs(counts[:, 0].mean() - 12) < 0.9
    assert 1.2 < counts[:, 0].std() < 2.3
    times = torch.zeros(24)
    for layers in chosen:
        times[layers.get(1, [])] += 1
    # binomial: mean 30 of 60, standard deviation 3.9
    assert 14 < times.min() <= times.max() < 46


def test_the_probe_is_limited_to_candidate_layers(material):
    probe = Probe({0: torch.ones(16), 1: -torch.arange(16.0), 3: torch.ones(16)}, 0.0, {"features": "residual"})
    scores = scores_of(material(axis="residual", probe=probe), "probe")
    assert list(scores) == LAYERS
    assert scores[1].tolist() == list(range(16))


def test_what_a_probe_lacks_is_named(material):
    with pytest.raises(UserError, match="--axis heads: a probe of MLP outputs says nothing about attention heads"):
        scores_of(material(axis="heads", probe=PROBE), "probe")
    with pytest.raises(UserError, match="--probe: way probe decodes a probe; give"):
        scores_of(material(), "probe")
    few = Probe({1: torch.ones(16)}, 0.0, {"features": "residual"})
    with pytest.raises(UserError, match=r"--layers \[3\]: the probe has \[1\]"):
        scores_of(material(probe=few), "probe")
    sae = Probe({1: torch.ones(16), 3: torch.ones(16)}, 0.0, {"features": "sae"})
    with pytest.raises(UserError, match="--sae: the probe was trained on SAE features"):
        scores_of(material(probe=sae), "probe")


def test_a_broken_model_is_named(material):
    given = material()
    next(given.lm.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="way gradient: layer 1 has scores that are not finite"):
        scores_of(given, "gradient")


@pytest.mark.parametrize(("layers", "said"), [([], "empty"), ([1, 4], r"\[4\]")])
def test_layers_that_are_not_there(tiny, layers, said):
    with pytest.raises(UserError, match=f"--layers: {said}: this model has layers 0 to 3"):
        Material(tiny(), layers)
