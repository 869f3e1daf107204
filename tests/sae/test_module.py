"""SAEs fitted through Lightning, and the folder that is left, against sae-lens and plain sums."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from sae_lens import SAE

from bad_neurons.artifacts import read_json
from bad_neurons.errors import UserError
from bad_neurons.formats import SAE_METRICS
from bad_neurons.sae.harvest import ActivationDataModule
from bad_neurons.sae.module import SAEFitter, save_sae

LAYERS, K = [1, 2], 4

pytestmark = [  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture(scope="module")
def fitted(tiny_folder, tmp_path_factory):
    """SAEs of two layers of the tiny Llama, whose activations have no norm behind them, trained on 6,000 tokens of text."""
    out = tmp_path_factory.mktemp("sae")
    torch.manual_seed(0)
    data = ActivationDataModule(
        tiny_folder("llama"),
        LAYERS,
        str(out / "activations"),
        records=None,
        max_tokens=6000,
        validation=0.1,
        batch_size=128,
        dtype="float32",
    )
    module = SAEFitter(tiny_folder("llama"), LAYERS, str(out), d_sae=64, k=K, lr=3e-3)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=30, check_val_every_n_epoch=15,
    )  # fmt: skip
    trainer.fit(module, data)
    held_out = {layer: torch.cat([batch[layer] for batch in data.val_dataloader()]) for layer in LAYERS}
    return SimpleNamespace(
        module=module, data=data, out=out, held_out=held_out, metrics=read_json(out / "metrics.json", SAE_METRICS)["layers"]
    )


def load(fitted, layer):
    return SAE.load_from_disk(fitted.out / f"layer-{layer}")


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_reconstruction_beats_the_mean(fitted, layer):
    sae, raw = load(fitted, layer), fitted.held_out[layer]
    error = (sae(raw) - raw).pow(2).sum()
    of_the_mean = (fitted.data.training_activations()[layer].float().mean(0) - raw).pow(2).sum()
    assert error < 0.1 * of_the_mean


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_the_saved_sae_reads_raw_activations(fitted, layer):
    """Raw in, raw out: the scale leaves through the encoder's input, so raw features are the trained ones over the scale."""
    sae, raw = load(fitted, layer), fitted.held_out[layer]
    norm = fitted.data.training_activations()[layer].float().norm(dim=-1).mean()
    scale = 16**0.5 / norm
    assert abs(scale - 1) > 0.05  # else the test would not see it
    trained = fitted.module.saes[str(layer)]
    scaled = trained.encode(raw * scale)
    torch.testing.assert_close(sae.encode(raw) * scale, scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(raw)) * scale, trained.decode(scaled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_decoder_rows_have_norm_one_and_the_folder_names_its_layer(fitted, layer):
    sae = load(fitted, layer)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert fitted.module.saes[str(layer)].W_dec.norm(dim=-1).sub(1).abs().max() > 0.05  # it was not so before saving
    assert (sae.cfg.architecture(), sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == ("topk", 16, 64, K)
    assert sae.cfg.metadata.hook_layer == layer
    assert sae.cfg.metadata.model_name == fitted.module.model


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_metrics_are_those_of_all_held_out_tokens(fitted, layer):
    sae, raw = load(fitted, layer), fitted.held_out[layer].double()
    n = sum(len(values[layer]) for values in (fitted.held_out, fitted.data.training_activations()))
    assert len(raw) == round(0.1 * n)
    assert len(fitted.data.val_dataloader()) > 1  # else the mean of a batch is the mean of all
    acts = sae.encode(raw.float())
    error = (sae.decode(acts).double() - raw).pow(2).sum()
    total = (raw - raw.mean(0)).pow(2).sum()
    reported = fitted.metrics[str(layer)]
    assert reported["variance_explained"] == pytest.approx(float(1 - error / total), abs=1e-5)
    assert reported["l0"] == pytest.approx(float((acts > 0).sum() / len(raw)), abs=0.02)
    assert 1 < reported["l0"] <= K
    silent = fitted.module.get_buffer(f"silent_{layer}") > 50
    assert reported["dead_features"] == pytest.approx(float((silent & ~(acts > 0).any(0)).float().mean()), abs=1.5 / 64)


def test_metrics_file_has_a_row_a_layer(fitted):
    assert {layer: set(row) for layer, row in fitted.metrics.items()} == {
        str(layer): {"variance_explained", "l0", "dead_features"} for layer in LAYERS
    }


class Zero:
    """An SAE whose first feature is always on, and whose reconstruction is zero."""

    b_dec = torch.tensor([5.0])

    def encode(self, x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    def decode(self, acts):
        return torch.zeros(len(acts), 1)


def test_variance_is_about_the_mean_of_all_batches():
    """Two batches that are constant in themselves: no variance about their own means, all of it about the common one."""
    module = SAEFitter("model", [0], d_sae=2, k=2)
    del module.saes
    module.saes = {"0": Zero()}
    module.register_buffer("scale_0", torch.tensor(1.0))
    module.register_buffer("silent_0", torch.tensor([99, 99]))
    module.on_validation_epoch_start()
    for batch in (torch.full((3, 1), 1.0), torch.full((1, 1), 5.0)):
        module.validation_step({0: batch}, 0)
    # Error 1+1+1+25 = 28; mean 2, variance 1+1+1+9 = 12.
    assert module._layer_metrics(0) == pytest.approx({"variance_explained": 1 - 28 / 12, "l0": 1.0, "dead_features": 0.5})


def test_saving_leaves_the_sae_itself_alone(fitted, tmp_path):
    sae = fitted.module.saes["1"]
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    save_sae(sae, 3.0, tmp_path / "layer-1")
    assert all(value.equal(before[name]) for name, value in sae.state_dict().items())
    assert not SAE.load_from_disk(tmp_path / "layer-1").b_dec.equal(before["b_dec"])


@pytest.mark.parametrize("k", [0, 65])
def test_k_beyond_the_width_is_refused(k):
    with pytest.raises(UserError, match=rf"--model.k {k}: between 1 and d_sae \(64\)"):
        SAEFitter("model", [0], d_sae=64, k=k)


def test_validate_measures_the_saved_saes(fitted):
    again = SAEFitter(fitted.module.model, fitted.module.layers, out=str(fitted.module.out))
    L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False).validate(again, fitted.data, verbose=False)
    for layer, row in fitted.module.metrics.items():
        assert again.metrics[layer]["variance_explained"] == pytest.approx(row["variance_explained"], abs=2e-3)
        assert again.metrics[layer]["l0"] == pytest.approx(row["l0"], abs=0.05)
