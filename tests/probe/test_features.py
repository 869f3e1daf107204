"""Pooled features against a loop over single examples with transformers and sae-lens, and the shards they are kept in."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from sae_lens import SAE

from bad_neurons.errors import RunError
from bad_neurons.models.view import view_decoder
from bad_neurons.probe import features as features_module
from bad_neurons.probe.features import Example, Pooling, extract_features, pool_max, pool_mean
from bad_neurons.sae.load import SAEs
from bad_neurons.shards import ALONE, Rank
from bad_neurons.testing import save_tiny_saes

LAYERS = [1, 3]


@pytest.fixture
def sae_folder(tmp_path):
    return save_tiny_saes(tmp_path / "sae", LAYERS, d_sae=32, k=4)


@pytest.fixture
def examples():
    """Ten examples whose lengths go up and down, so that batches by length reorder them; the answers have 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = [12, 30, 7, 25, 9, 18, 30, 11, 6, 21]
    return [Example([2, *torch.randint(3, 259, (n - 1,), generator=generator).tolist()], n - 1 - i % 5) for i, n in enumerate(lengths)]


def extracted(view, examples, saes, layers, pool, tokens, folder, key, rank=ALONE):
    """All that is extracted with one pooling, by ``<features>.<layer>``."""
    found = extract_features(view, examples, saes, layers, [Pooling(pool, tokens)], folder, key, rank)
    return {
        f"{kind}.{layer}": found.read(Pooling(pool, tokens), kind, layer)
        for kind in (["sae"] if saes.turns else []) + ["residual"]
        for layer in layers
    }


VALUES = torch.tensor([[1.0, -4.0], [5.0, -2.0], [9.0, -1.0]])


def test_pools_by_hand():
    assert pool_max(VALUES).tolist() == [9.0, -1.0]
    assert pool_mean(VALUES).tolist() == [5.0, pytest.approx(-7 / 3)]


def by_loop(lm, point, sae_folder, examples, pool, tokens):
    """The same features, one example after the other, by a hook in a plain pass and the SAE's own encoder."""
    expected = {}
    for layer in LAYERS:
        sae = SAE.load_from_disk(f"{sae_folder}/layer-{layer}")
        for example in examples:
            seen = []
            handle = getattr(lm.model.model.layers[layer], point).register_forward_hook(
                lambda _m, _a, output, seen=seen: seen.append(output[0])
            )
            with torch.no_grad():
                lm.model(input_ids=torch.tensor([example.ids]))
                handle.remove()
                rows = seen[0][example.answer_start if tokens == "answer" else 1 :]
                for name, values in (("residual", rows), ("sae", sae.encode(rows))):
                    pooled = values.max(0).values if pool == "max" else values.sum(0) / len(values)
                    expected.setdefault(f"{name}.{layer}", []).append(pooled)
    return {name: torch.stack(rows) for name, rows in expected.items()}


@pytest.mark.parametrize(
    ("family", "point", "pool", "tokens"),
    [
        ("gemma2", "post_feedforward_layernorm", "max", "answer"),
        ("gemma2", "post_feedforward_layernorm", "mean", "all"),
        ("llama", "mlp", "mean", "answer"),
        ("llama", "mlp", "max", "all"),
    ],
)
def test_features_equal_an_unbatched_loop_in_the_same_order(tiny, monkeypatch, sae_folder, examples, tmp_path, family, point, pool, tokens):
    monkeypatch.setattr(features_module, "_BATCH_TOKENS", 64)
    monkeypatch.setattr(features_module, "_SHARD_EXAMPLES", 4)
    lm = tiny(family)
    saes = SAEs(sae_folder, LAYERS, 16)
    found = extracted(view_decoder(lm.model), examples, saes, LAYERS, pool, tokens, tmp_path / "shards", "key")
    expected = by_loop(lm, point, sae_folder, examples, pool, tokens)
    assert {name: value.shape for name, value in found.items()} == {
        **{f"sae.{layer}": (10, 32) for layer in LAYERS},
        **{f"residual.{layer}": (10, 16) for layer in LAYERS},
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)
        assert found[name].dtype == torch.float32
    other = by_loop(lm, point, sae_folder, examples, pool, {"answer": "all", "all": "answer"}[tokens])
    assert (found["residual.1"] - other["residual.1"]).abs().max() > 0.01  # the choice of tokens matters


@pytest.fixture
def ran(monkeypatch):
    """Number of rows of each batch that the model read."""
    rows = []
    original = features_module.visit_mlp_outputs

    def counted(view, packed, layers, visit):
        rows.append(len(packed.input_ids))
        return original(view, packed, layers, visit)

    monkeypatch.setattr(features_module, "visit_mlp_outputs", counted)
    monkeypatch.setattr(features_module, "_SHARD_EXAMPLES", 4)
    return rows


def test_the_model_runs_once_for_one_key(tiny, sae_folder, examples, tmp_path, ran):
    view, saes = view_decoder(tiny().model), SAEs(sae_folder, LAYERS, 16)
    folder = tmp_path / "shards"

    def extract(key="key", pool="max", tokens="answer", given=saes, layers=LAYERS, of=examples):
        ran.clear()
        found = extracted(view, of, given, layers, pool, tokens, folder, key)
        return found, sum(ran)

    first, rows = extract()
    assert rows == 10
    assert sorted(p.name for p in folder.iterdir()) == [f"shard-{i:05d}.safetensors" for i in range(3)]
    again, rows = extract()
    assert rows == 0
    assert all(again[name].equal(first[name]) for name in first)

    (folder / "shard-00001.safetensors").unlink()
    resumed, rows = extract()
    assert rows == 4
    assert all(resumed[name].equal(first[name]) for name in first)

    shifted = [Example(e.ids, e.answer_start - 1) for e in examples]
    changes = [
        {"key": "other"},
        {"pool": "mean"},
        {"tokens": "all"},
        {"given": SAEs(None, LAYERS, 16)},
        {"layers": [1]},
        {"of": shifted},
        {"of": examples[:3]},
    ]
    for change in changes:
        assert extract(**change)[1] == (3 if change.get("of") == examples[:3] else 10), change
    assert sorted(p.name for p in folder.glob("shard-*")) == ["shard-00000.safetensors"]


def test_several_poolings_in_one_pass(tiny, sae_folder, examples, tmp_path, ran):
    """Each is what it is alone, also where SAEs take turns; the model runs once for all."""
    view, poolings = view_decoder(tiny().model), [Pooling(pool, tokens) for pool in ("max", "mean") for tokens in ("answer", "all")]
    alone = {p: extracted(view, examples, SAEs(sae_folder, LAYERS, 16), LAYERS, *p, tmp_path / "-".join(p), "key") for p in poolings}
    for budget in (float("inf"), 1):
        ran.clear()
        saes = SAEs(sae_folder, LAYERS, 16, budget=budget)
        found = extract_features(view, examples, saes, LAYERS, poolings, tmp_path / f"all-{budget}", "key")
        assert sum(ran) == 10
        for pooling, features in alone.items():
            for name, values in features.items():
                kind, layer = name.split(".")
                torch.testing.assert_close(found.read(pooling, kind, int(layer)), values, rtol=1e-5, atol=1e-6)
    assert len({float(features["sae.1"].sum()) for features in alone.values()}) == 4
    with pytest.raises(KeyError, match=r"max\.answer\.sae\.0 was not extracted"):
        found.read(poolings[0], "sae", 0)


def test_without_saes_there_are_only_activations(tiny, examples, tmp_path):
    found = extracted(view_decoder(tiny().model), examples, SAEs(None, [2], 16), [2], "mean", "answer", tmp_path, "key")
    assert {name: value.shape for name, value in found.items()} == {"residual.2": (10, 16)}


def with_shared_prompts(examples):
    """Each example, and its prompt with another answer."""
    return [e for example in examples for e in (example, Example([*example.ids[: example.answer_start], 50, 60], example.answer_start))]


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_answers_that_share_a_prompt_get_what_they_get_alone(tiny, monkeypatch, sae_folder, examples, tmp_path, tokens):
    lm, pairs = tiny("gemma3"), with_shared_prompts(examples)
    found = extracted(view_decoder(lm.model), pairs, SAEs(sae_folder, LAYERS, 16), LAYERS, "max", tokens, tmp_path, "key")
    for name, values in by_loop(lm, "post_feedforward_layernorm", sae_folder, pairs, "max", tokens).items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_read_once_for_all_its_answers(tiny, examples, tmp_path, ran):
    pairs = with_shared_prompts(examples[:2])
    extracted(view_decoder(tiny().model), pairs, SAEs(None, [1], 16), [1], "max", "answer", tmp_path, "key")
    assert sum(ran) == 2


def test_saes_in_turns_give_the_same_and_run_the_model_once(tiny, tmp_path, examples, ran):
    layers = [0, 1, 3]
    folder = save_tiny_saes(tmp_path / "three", layers, d_sae=32, k=4)
    view = view_decoder(tiny().model)
    one = 4 * (2 * 16 * 32 + 32 + 16)  # bytes of one SAE: encoder and decoder, and their biases
    expected = extracted(view, examples, SAEs(folder, layers, 16), layers, "max", "answer", tmp_path / "a", "key")
    rows = sum(ran)
    for budget, turns in ((2 * one, [[0, 1], [3]]), (one, [[0], [1], [3]]), (1, [[0], [1], [3]]), (3 * one, [layers])):
        ran.clear()
        saes = SAEs(folder, layers, 16, budget=budget)
        assert saes.turns == turns
        found = extracted(view, examples, saes, layers, "max", "answer", tmp_path / f"{budget}", "key")
        assert sum(ran) == rows
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert len(saes._loaded) <= max(len(turn) for turn in turns)
    (tmp_path / f"{one}" / "turn-3-00001.safetensors").unlink()
    ran.clear()
    again = extracted(view, examples, SAEs(folder, layers, 16, budget=one), layers, "max", "answer", tmp_path / f"{one}", "key")
    assert ran == []
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_ranks_share_the_shards(tiny, sae_folder, examples, tmp_path, ran):
    view = view_decoder(tiny().model)
    alone = extracted(view, examples, SAEs(sae_folder, LAYERS, 16), LAYERS, "max", "answer", tmp_path / "alone", "key")

    def others():
        """What the other ranks do while rank 0 waits: their own shards."""
        for number in (1, 2):
            rank = Rank(number, 3, lambda: None)
            with pytest.raises(FileNotFoundError) if number == 1 else nullcontext():  # rank 2's are not there yet
                extracted(view, examples, SAEs(sae_folder, LAYERS, 16), LAYERS, "max", "answer", tmp_path / "shared", "key", rank)

    ran.clear()
    shared = extracted(
        view, examples, SAEs(sae_folder, LAYERS, 16), LAYERS, "max", "answer", tmp_path / "shared", "key", Rank(0, 3, others)
    )
    assert sum(ran) == 10
    assert all(torch.equal(shared[name], alone[name]) for name in alone)


@pytest.mark.parametrize(("spoil", "said"), [("model", "activations of layer 3"), ("sae", "SAE features of layer 1")])
def test_values_that_are_not_finite_are_named(tiny, examples, sae_folder, tmp_path, spoil, said):
    lm = tiny("llama")
    saes = SAEs(sae_folder, LAYERS, 16)
    with torch.no_grad():
        if spoil == "model":
            lm.model.model.layers[3].mlp.down_proj.weight[2] = torch.inf
        else:
            saes.load(LAYERS)[1].W_enc[0, 0] = torch.nan
    with pytest.raises(RunError, match=f"^{said}: "):
        extracted(view_decoder(lm.model), examples, saes, LAYERS, "max", "answer", tmp_path / "features", "key")
