"""SAEs from folders and by release, and what one unit of a feature adds."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file

from bad_neurons.errors import UserError
from bad_neurons.sae.load import decoder_directions, load_saes
from bad_neurons.testing import save_tiny_saes

GEMMA_SCOPE = "gemma-scope-2b-pt-mlp-canonical:layer_{layer}/width_16k/canonical"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_saes(tmp_path / "sae", [1, 3], d_in=16, d_sae=32, k=4)


def test_a_folder_gives_the_sae_of_each_layer(folder):
    saes = load_saes(folder, [3, 1], d_in=16)
    assert list(saes) == [3, 1]
    for layer, sae in saes.items():
        stored = load_file(f"{folder}/layer-{layer}/sae_weights.safetensors")
        assert {name: value.equal(stored[name]) for name, value in sae.state_dict().items()} == dict.fromkeys(stored, True)
        assert not sae.training
        assert not any(p.requires_grad for p in sae.parameters())
    assert not saes[1].W_dec.equal(saes[3].W_dec)


def refusal(source, layers, d_in=16):
    with pytest.raises(UserError) as error:
        load_saes(source, layers, d_in)
    return str(error.value)


def test_another_width_is_refused(folder):
    assert refusal(folder, [1], 2304) == f"SAE {folder}: layer 1 reads 16 dimensions, but the model has 2304; give SAEs of this model"


def test_the_sae_of_another_layer_is_refused(folder, tmp_path):
    (tmp_path / "sae" / "layer-1").rename(tmp_path / "sae" / "layer-2")
    assert refusal(folder, [2]) == f"SAE {folder}: the one given for layer 2 was trained on layer 1"


def test_a_missing_layer_is_told_with_those_that_are_there(folder, tmp_path):
    message = refusal(folder, [1, 2])
    assert message.startswith(f"SAE {tmp_path}/sae/layer-2: cannot be loaded (")
    assert message.endswith("; the folder has layer-1, layer-3")
    (tmp_path / "empty").mkdir()
    assert refusal(str(tmp_path / "empty"), [0]).endswith("; the folder has none")


def test_a_damaged_sae_is_refused(folder, tmp_path):
    weights = tmp_path / "sae" / "layer-1" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert refusal(folder, [1]).startswith(
        f"SAE {tmp_path}/sae/layer-1: sae_weights.safetensors is damaged or changed since it was written"
    )


@pytest.mark.parametrize("source", ["runs/nowhere", "gemma-scope-2b-pt-mlp-canonical:layer_5/width_16k/canonical", "{layer}"])
def test_neither_a_folder_nor_a_release_with_a_layer_is_refused(source):
    assert refusal(source, [5]).startswith(
        f"SAE {source}: neither a folder here nor release:id with {{layer}} in the id, such as gemma-scope"
    )


@pytest.mark.timeout(20)  # sae-lens knows its releases by heart
@pytest.mark.parametrize("source", ["no-such-release:layer_{layer}/x", "gemma-scope-2b-pt-mlp-canonical:layer_{layer}/width_17k/canonical"])
def test_an_unknown_release_or_id_is_refused_without_a_network(source):
    message = refusal(source, [5])
    assert message.startswith(f"SAE {source}: layer 5: unknown release or id, or no network (ValueError: ")
    assert ("no-such-release not found" if source.startswith("no") else "ID layer_5/width_17k/canonical not found") in message


def test_release_and_id_reach_sae_lens(folder, monkeypatch):
    asked = []

    def pretrained(release, sae_id, device):
        asked.append((release, sae_id, device))
        return SAE.load_from_disk(f"{folder}/layer-{sae_id.split('/')[0].removeprefix('layer_')}")

    monkeypatch.setattr(SAE, "from_pretrained", pretrained)
    saes = load_saes(GEMMA_SCOPE, [1, 3], d_in=16)
    assert asked == [("gemma-scope-2b-pt-mlp-canonical", f"layer_{layer}/width_16k/canonical", "cpu") for layer in (1, 3)]
    assert [sae.cfg.metadata.hook_layer for sae in saes.values()] == [1, 3]


@pytest.mark.parametrize("size", ["2b", "9b"])
def test_sae_lens_knows_gemma_scope_for_every_layer(size):
    known = get_pretrained_saes_directory()[f"gemma-scope-{size}-pt-mlp-canonical"].saes_map
    assert {f"layer_{layer}/width_16k/canonical" for layer in range({"2b": 26, "9b": 42}[size])} <= set(known)


@pytest.mark.parametrize("rescaled", [True, False])
@torch.no_grad()
def test_a_unit_of_a_feature_adds_its_direction(rescaled):
    sae = TopKSAE(TopKSAEConfig(d_in=6, d_sae=10, k=3, rescale_acts_by_decoder_norm=rescaled))
    sae.W_dec.copy_(torch.randn(10, 6) * torch.arange(1, 11)[:, None])  # rows of very different norm
    sae.b_dec.copy_(torch.randn(6))
    directions = decoder_directions(sae)
    nothing = sae.decode(torch.zeros(1, 10))
    added = torch.cat([sae.decode(row[None]) - nothing for row in torch.eye(10)])
    torch.testing.assert_close(directions, added, rtol=1e-4, atol=1e-5)
    assert directions.equal(sae.W_dec) is not rescaled
    assert (directions.norm(dim=-1) - 1).abs().max().item() < 1e-5 or not rescaled


def test_directions_are_float32_and_leave_the_sae_alone(folder):
    sae = load_saes(folder, [1], 16)[1].to(torch.bfloat16)
    before = sae.W_dec.clone()
    assert decoder_directions(sae).dtype == torch.float32
    assert sae.W_dec.equal(before)
