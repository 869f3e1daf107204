"""Checkpoints: what they hold, what they refuse, and that going on equals never having stopped."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from bad_neurons.callbacks import DeltaCheckpoint, GradientMask
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from bad_neurons.artifacts import write_jsonl
from bad_neurons.data.tuning import SycophancyDataModule
from bad_neurons.errors import UserError
from bad_neurons.tuning.delta_file import read_delta

TOPICS = ["moon", "salt", "bees", "rivers", "glass"]
NAMES = {f"layers.{layer}.{name}" for layer in (1, 3) for name in ("gate_proj", "up_proj", "down_proj")}
SIZE = 4 * 3 * 24  # chosen neurons x matrices x m, on the residual axis


class Crash(Callback):
    """Stops the process, as far as a test can, at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("power cut")


@pytest.fixture
def data(tmp_path, tiny_folder):
    """``data()``: a new data module with 12 training batches of unequal lengths."""
    rows = [
        {"prompt": f"Tell me about {topic} number {i}{'!' * 3 * i}", "honest": "no" + "o" * i, "sycophantic": "yes", "topic": topic}
        for topic in TOPICS
        for i in range(8)
    ]
    write_jsonl(tmp_path / "records.jsonl", rows)
    return lambda: SycophancyDataModule(
        tiny_folder("gemma2"), str(tmp_path / "records.jsonl"), batch_tokens=170, retention_rows=1, retention_tokens=12
    )


@pytest.fixture
def run(tmp_path, tuner, neurons, data, quiet):
    """``run(folder, callbacks, ckpt)``: a two-epoch fit with a checkpoint an epoch; gives the finished module."""

    def fit(folder, *callbacks, ckpt=None, chosen=None, mode="delta", **options):
        module = tuner(lr=0.01, weight_decay=0.1, warmup_steps=3, decay="linear", **options)
        keep = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1, save_last=True, every_n_epochs=1)
        trainer = L.Trainer(
            **{**quiet, "enable_checkpointing": True}, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0,
            callbacks=[GradientMask(chosen or neurons(), mode), *callbacks, keep],
        )  # fmt: skip
        trainer.fit(module, data(), ckpt_path=ckpt)
        return module

    return fit


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it is the one to go on from
def test_going_on_is_never_having_stopped(run, tmp_path):
    whole = run("whole", DeltaCheckpoint(str(tmp_path / "whole.safetensors"))).edit.deltas()
    with pytest.raises(RuntimeError, match="power cut"):
        run("cut", Crash(epoch=1))
    halfway = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["state_dict"]
    resumed = run("cut", DeltaCheckpoint(str(tmp_path / "resumed.safetensors")), ckpt=str(tmp_path / "cut" / "last.ckpt"))
    assert resumed.trainer.global_step == 2 * 6
    for name, value in resumed.edit.deltas().items():
        assert (value - halfway[name]).abs().max() > 1e-3
        assert torch.equal(value, whole[name])
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()


def test_every_epoch_has_its_own_order(data):
    module = data()
    module.setup("fit")
    loader = module.train_dataloader()
    orders = []
    for epoch in (0, 1, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(list(loader.sampler))
    assert len(orders[0]) == 12
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1] != list(range(12))
    assert (orders[1], orders[0]) == (orders[2], orders[3])


def test_what_a_checkpoint_holds(run, tmp_path):
    module = run("kept")
    path = tmp_path / "kept" / "epoch=1.ckpt"
    content = torch.load(path, weights_only=True)  # no code in it
    assert set(content["state_dict"]) == NAMES
    assert sum(value.numel() for value in content["state_dict"].values()) == SIZE
    moments = [value for state in content["optimizer_states"][0]["state"].values() for value in state.values() if value.ndim]
    assert sum(value.numel() for value in moments) == 2 * SIZE
    assert content["bad_neurons"] == {"neurons": module.edit.selection.digest, "model": module.model_digest}
    assert path.stat().st_size < 3 * 4 * SIZE + 32_000 < 4 * sum(p.numel() for p in module.lm.parameters())


def test_the_delta_file_holds_the_deltas_of_the_end(run, tmp_path):
    module = run("kept", DeltaCheckpoint(str(tmp_path / "out" / "delta.safetensors")))
    content = read_delta(tmp_path / "out" / "delta.safetensors")
    assert (content.selection, content.deltas.keys()) == (module.edit.selection, NAMES)
    assert all(torch.equal(content.deltas[name], value) for name, value in module.edit.deltas().items())
    assert all(value.abs().max() > 1e-3 for value in content.deltas.values())


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"layers": {1: [0, 5, 14], 3: [2]}}, "belongs to other neurons"),
        ({"axis": "intermediate"}, "belongs to other neurons"),
        ({"layers": {1: [0, 5, 15]}}, "belongs to other neurons"),
    ],
)
def test_other_neurons_are_refused(run, neurons, tmp_path, choice, said):
    run("kept")
    other = neurons(name="other.json", **choice)
    with pytest.raises(UserError, match=said):
        run("other", ckpt=str(tmp_path / "kept" / "last.ckpt"), chosen=other)


def test_another_model_is_refused(tuner, neurons, run, tmp_path):
    module = run("kept")
    content = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    content["bad_neurons"]["model"] = "0" * 64
    with pytest.raises(UserError, match=rf"other model \(000000000000, here {module.model_digest[:12]}\)"):
        module.on_load_checkpoint(content)
    with pytest.raises(UserError, match="other neurons"):
        module.on_load_checkpoint({})


def test_the_hook_form_saves_the_same_tensors(run, tmp_path):
    delta, hook = (run(mode, mode=mode, optimizer="sgd").edit.deltas() for mode in ("delta", "hook"))
    content = torch.load(tmp_path / "hook" / "last.ckpt", weights_only=True)
    assert set(content["state_dict"]) == NAMES
    assert all(torch.equal(content["state_dict"][name], value) for name, value in hook.items())
    assert {name: value.shape for name, value in delta.items()} == {name: value.shape for name, value in hook.items()}
