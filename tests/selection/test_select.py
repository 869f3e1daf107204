"""The whole selection stage against numpy on the files themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bad_neurons.artifacts import read_json
from bad_neurons.data.splits import load_split
from bad_neurons.data.text import load_paragraphs
from bad_neurons.data.tuning import draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.formats import NEURONS
from bad_neurons.models.load import load_model
from bad_neurons.probe.module import write_probe
from bad_neurons.selection.neurons import write_neurons
from bad_neurons.selection.select import select
from bad_neurons.selection.ways import WAYS, Material, scores_of
from bad_neurons.testing import save_tiny_saes
from helpers import write_records

LAYERS, D_SAE = [1, 3], 32


@pytest.fixture
def stage(tiny, tiny_folder, tmp_path):
    """Files of a model, its SAEs and a probe with random weights (half of them zero), and how to select from them."""

    class Stage:
        model, sae, probe, out = (
            tiny_folder(),
            save_tiny_saes(tmp_path / "sae", LAYERS, d_sae=D_SAE),
            tmp_path / "probe.safetensors",
            tmp_path / "out",
        )
        digest = tiny().digest

        def write_probe(self, features="sae", width=D_SAE, digest=digest):
            generator = torch.Generator().manual_seed(11)
            weights = {layer: torch.randn(width, generator=generator) * (torch.rand(width, generator=generator) < 0.5) for layer in LAYERS}
            origin = {"model": {"id": "tiny", "digest": digest}, "features": features, "layers": LAYERS, "widths": [width] * 2}
            write_probe(self.probe, weights, 0.1, origin)
            return {layer: w.numpy().astype(np.float64) for layer, w in weights.items()}

        def select(self, **options):
            found = select(
                **{"model": self.model, "probe": str(self.probe), "sae": self.sae, "out": str(self.out), "dtype": "float32", **options}
            )
            assert read_json(self.out / "neurons.json", NEURONS) == found.to_json()
            return found

    return Stage()


@pytest.fixture(autouse=True)
def plotted(monkeypatch):
    """Arguments of the plot, which is tested with the report."""
    calls = []
    monkeypatch.setattr("bad_neurons.report.plots.plot_weights", lambda *args: calls.append(args))
    return calls


def scores_by_numpy(stage, weights, axis, features="sae"):
    """{layer: scores}, float64, from the stored tensors and the formulas of the paper and DESIGN step 5."""
    stored = load_file(f"{stage.model}/model.safetensors")
    scores = {}
    for layer, w in weights.items():
        v = w if features == "residual" else w @ load_file(f"{stage.sae}/layer-{layer}/sae_weights.safetensors")["W_dec"].astype(np.float64)
        if axis == "residual":
            scores[layer] = np.abs(v)
        else:
            gain = 1 + stored[f"model.layers.{layer}.post_feedforward_layernorm.weight"].astype(np.float64)
            scores[layer] = np.abs((v * gain) @ stored[f"model.layers.{layer}.mlp.down_proj.weight"].astype(np.float64))
    return scores


def top_p_by_loop(scores, share):
    """The best neurons one after the other until they hold the share."""
    ranked = sorted(((s, layer, i) for layer, row in scores.items() for i, s in enumerate(row)), reverse=True)
    chosen, held, total = {}, 0.0, sum(s for s, *_ in ranked)
    for s, layer, i in ranked:
        if held >= share * total:
            break
        held += s
        chosen.setdefault(layer, []).append(i)
    return {layer: sorted(indices) for layer, indices in sorted(chosen.items())}


@pytest.mark.parametrize(("axis", "size"), [("residual", 16), ("intermediate", 24)])
@pytest.mark.parametrize("features", ["sae", "residual"])
def test_top_p_of_both_axes_and_both_probes(stage, axis, size, features):
    weights = stage.write_probe(features, D_SAE if features == "sae" else 16)
    sae = stage.sae if features == "sae" else "nowhere"  # a residual probe needs none
    found = stage.select(axis=axis, rule="top_p", amount=0.3, sae=sae)
    scores = scores_by_numpy(stage, weights, axis, features)
    assert found.layers == top_p_by_loop(scores, 0.3)
    assert 1 < found.count < size
    assert (found.axis, found.size, found.candidates) == (axis, size, LAYERS)
    for layer, indices in found.layers.items():
        np.testing.assert_allclose(found.scores[layer], scores[layer][indices], rtol=1e-4)
    said = {"way": "probe", "objective": "odds", "damping": 0.01, "seed": 0, "probe": features}
    assert found.rule == {"name": "top_p", "amount": 0.3, **said}
    assert found.share == pytest.approx(found.count / (2 * size))


def test_the_axes_and_the_probes_choose_differently(stage):
    stage.write_probe()
    chosen = [stage.select(axis=axis, rule="top_k_per_layer", amount=5).layers for axis in ("residual", "intermediate")]
    stage.write_probe("residual", 16)
    chosen.append(stage.select(axis="residual", rule="top_k_per_layer", amount=5).layers)
    assert all({layer: len(indices) for layer, indices in c.items()} == {1: 5, 3: 5} for c in chosen)
    assert len({json.dumps(c) for c in chosen}) == 3


def test_llama_has_no_gain(stage, tiny, tiny_folder):
    stage.model = tiny_folder("llama")
    weights = stage.write_probe(digest=tiny("llama").digest)
    found = stage.select(axis="intermediate", rule="top_k_per_layer", amount=24)
    for layer, w in weights.items():
        v = w @ load_file(f"{stage.sae}/layer-{layer}/sae_weights.safetensors")["W_dec"]
        by_hand = np.abs(v @ load_file(f"{stage.model}/model.safetensors")[f"model.layers.{layer}.mlp.down_proj.weight"])
        np.testing.assert_allclose(found.scores[layer], by_hand, rtol=1e-3, atol=1e-5)


def test_the_file_names_its_model(stage):
    stage.write_probe()
    stage.select()
    content = json.loads((stage.out / "neurons.json").read_text())
    assert content["format"] == "bad-neurons/neurons/2"
    assert content["model"] == {"id": stage.model, "digest": stage.digest}
    assert content["count"] == sum(content["counts"].values()) == sum(len(indices) for indices in content["layers"].values())


def test_the_plot_gets_the_probe_and_its_control(stage, plotted, tmp_path):
    stage.write_probe()
    stage.select()
    stage.select(control=str(stage.probe))
    (probe, nothing, path), (_, control, _) = plotted
    assert (nothing, path) == (None, stage.out / "weights.png")
    assert probe.weights[3].equal(control.weights[3])


def refusal(stage, **options):
    with pytest.raises(UserError) as error:
        stage.select(**options)
    assert not stage.out.exists()
    return str(error.value)


def test_the_probe_of_another_model_is_refused(stage, tiny_folder):
    stage.write_probe()
    other = tiny_folder(seed=1)
    assert refusal(stage, model=other).startswith(f"probe {stage.probe}: trained on tiny, another model than {other}; run")


def test_saes_of_another_width_or_layer_are_refused(stage, tmp_path):
    stage.write_probe()
    wide = save_tiny_saes(tmp_path / "wide", LAYERS, d_sae=48)
    assert refusal(stage, sae=wide).startswith(f"SAE {wide}: layer 1 has 48 features, but the probe has 32 weights; give the SAE")
    few = save_tiny_saes(tmp_path / "few", [1], d_sae=D_SAE)
    assert refusal(stage, sae=few).endswith("the folder has layer-1")


@pytest.mark.parametrize(
    ("rule", "amount", "message"),
    [
        ("top_p", 0.0, "--amount 0.0: a share above 0 and at most 1"),
        ("top_fraction", 1.5, "--amount 1.5: a share above 0 and at most 1"),
        ("top_k_per_layer", -2, "--amount -2: a share above 0 and at most 1"),
        ("top_k_per_layer", 0.5, "--amount 0.5: rule top_k_per_layer chose no neuron; raise it"),
    ],
)
def test_an_empty_choice_is_refused(stage, rule, amount, message):
    stage.write_probe()
    assert refusal(stage, rule=rule, amount=amount).startswith(message)


@pytest.fixture
def other_ways(stage, tmp_path):
    """How to select from records of our own, without a probe or SAEs."""
    records = write_records(tmp_path / "records.jsonl")
    return lambda **options: stage.select(
        **{"records": records, "max_records": 4, "max_texts": 3, "probe": "none", "sae": "none", **options}
    )


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"probe", "heads"}))
def test_ways_that_need_no_probe(stage, other_ways, plotted, way):
    found = other_ways(way=way, layers=[2, 1], axis="intermediate", rule="top_fraction", amount=0.125, objective="neutral", seed=7)
    assert (found.candidates, found.count, found.size, found.axis) == ([1, 2], 6, 24, "intermediate")
    said = {"way": way, "objective": "neutral", "damping": 0.01, "seed": 7}
    assert found.rule == {"name": "top_fraction", "amount": 0.125, **said}
    assert all(score >= 0 for scores in found.scores.values() for score in scores)
    assert plotted == []
    assert sorted(path.name for path in stage.out.iterdir()) == ["neurons.json"]


def test_what_the_stage_gives_the_way(stage, other_ways, tmp_path):
    found = other_ways(way="fisher", layers=[1, 3], rule="all", split_seed=3, seed=5, max_records=3, max_texts=2)
    split = load_split(str(tmp_path / "records.jsonl"), 0.2, 0.2, 3)
    lm = load_model(stage.model, "float32")
    texts = load_paragraphs("python-docs", "retention", 5)[:2]
    material = Material(lm, [1, 3], records=draw_evenly(split.train, 3, 5), texts=texts, seed=5)
    scores = scores_of(material, "fisher")
    assert {layer: scores[layer].tolist() for layer in (1, 3)} == found.scores


def test_layers_are_the_probes_where_none_are_given(stage, other_ways):
    stage.write_probe()
    assert other_ways(way="random", probe=str(stage.probe)).candidates == LAYERS
    assert other_ways(way="random", probe=str(stage.probe), layers=[0, 2]).candidates == [0, 2]
    weights = stage.write_probe("residual", 16)
    found = other_ways(way="probe", probe=str(stage.probe), layers=[3], rule="all")
    assert found.layers == {3: list(range(16))}
    np.testing.assert_allclose(found.scores[3], np.abs(weights[3]), rtol=1e-6)


def test_as_many_of_each_layer_as_another_choice(stage, other_ways, tmp_path):
    stage.write_probe()
    first = stage.select(rule="top_p", amount=0.3, out=str(tmp_path / "out"))
    like = str(tmp_path / "first.json")
    write_neurons(like, first)
    chosen = [other_ways(way="random", layers=LAYERS, rule="same_counts", like=like, seed=seed) for seed in (1, 1, 2)]
    counts = {layer: len(indices) for layer, indices in first.layers.items()}
    assert all({layer: len(indices) for layer, indices in c.layers.items()} == counts for c in chosen)
    assert chosen[0].layers == chosen[1].layers != chosen[2].layers
    assert chosen[0].rule["like"] == like


def test_a_way_without_its_inputs_is_refused(stage, other_ways):
    def said(**options):
        with pytest.raises(UserError) as error:
            other_ways(**options)
        assert not stage.out.exists()
        return str(error.value)

    for way in ("probe", "random", "gradient"):
        assert said(way=way) == "probe none: no such file; `bad-neurons probe fit` writes it, and ways other than probe need only --layers"
    assert said(way="random", layers=[4]).startswith("--layers: [4]: this model has layers 0 to 3")
    assert said(way="random", layers=[1], rule="same_counts").startswith("--like: rule same_counts copies the counts")
    assert said(way="fisher", layers=[1], max_texts=0).startswith("--text: way fisher weighs side effects on unrelated text")
    assert said(way="random", layers=[1], rule="top_fraction", amount=float("nan")).startswith("--amount nan: a share above 0")
