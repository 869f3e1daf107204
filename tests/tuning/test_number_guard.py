"""NumberGuard: NaN and infinity stop a fit in front of the step, with names, and the state before is kept."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from bad_neurons.callbacks import DeltaCheckpoint, GradientMask, NumberGuard
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from bad_neurons.errors import RunError
from bad_neurons.numbers import check_finite, first_nonfinite_output, named, nonfinite

LENGTHS = [(5, 4), (9, 2)]
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # some tests fit twice


class Resumable(DataLoader):
    """Batches in order; its state is how many were given, and it begins behind ``skip`` of them."""

    def __init__(self, batches, skip=0):
        super().__init__(batches, batch_size=None)
        self.given, self.skip = 0, skip

    def __iter__(self):
        self.given, self.skip = self.skip, 0
        for number in range(self.given, len(self.dataset)):
            self.given += 1
            yield self.dataset[number]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skip = state["given"]


class BadGradient(Callback):
    """Puts a value into the gradient of one parameter in one step."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            pl_module.edit.values["layers-3-up_proj"].grad[0, 0] = self.value


@pytest.fixture
def batches(make_batch):
    """``batches(bad, value)``: six batches with ids, of which one has a loss that is ``value``."""

    def made(bad=None, value=torch.nan):
        found = [make_batch(LENGTHS, [11], seed=i)._replace(records=(f"r{i}a", f"r{i}b")) for i in range(6)]
        if bad is not None:
            weights = found[bad].honest.clone()
            weights[0] = value
            found[bad] = found[bad]._replace(honest=weights)
        return found

    return made


@pytest.fixture
def run(tmp_path, tuner, neurons, quiet):
    """``run(batches, *callbacks, ckpt=..., **options of the Trainer)``: a fit of one epoch; gives the module."""

    def fit(batches, *callbacks, guard=None, ckpt=None, lr=0.01, decay="linear", warmup_steps=1, mode="delta", **options):
        module = tuner(lr=lr, weight_decay=0.1, decay=decay, warmup_steps=warmup_steps)
        delta = str(tmp_path / "d.safetensors")
        keep = ModelCheckpoint(tmp_path / "ckpt", "last", every_n_epochs=1, enable_version_counter=False)
        trainer = L.Trainer(
            **{**quiet, "enable_checkpointing": True, "max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": 1.0, **options},
            callbacks=[GradientMask(neurons(), mode), *callbacks, guard or NumberGuard(), DeltaCheckpoint(delta), keep],
        )  # fmt: skip
        skip = 0
        if ckpt:  # Lightning 2.6 does not load it where the number of batches was asked for before
            loops = torch.load(ckpt, weights_only=True)["loops"]["fit_loop"]
            skip = loops["state_dict"]["combined_loader"][0]["given"]
        trainer.fit(module, Resumable(batches, skip), Resumable(batches), ckpt_path=ckpt)
        return module

    return fit


def test_names_of_what_is_not_finite():
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor(torch.inf), "d": torch.ones(2, 2)}
    assert nonfinite(tensors) == ["b", "c"]
    assert nonfinite({}) == []
    assert named(list("abcde")) == "a, b, c and 2 more"
    assert named(list("ab")) == "a, b"


def test_the_first_module_that_gives_nan_is_found():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert first_nonfinite_output(model, lambda: model(torch.ones(1, 2))) is None
    with torch.no_grad():
        model[1].bias[0] = torch.inf
    assert first_nonfinite_output(model, lambda: model(torch.ones(1, 2))) == "1"
    assert not any(module._forward_hooks for module in model)


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "2 of 6 values are NaN "), (-torch.inf, "2 of 6 values are infinity ")])
def test_values_are_refused_with_their_kind(value, said):
    check_finite(torch.ones(6), "layer 5")
    with pytest.raises(RunError, match=f"layer 5: {said}.*float32"):
        check_finite(torch.tensor([1.0, value, 2.0, value, 0.0, -1.0]), "layer 5")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_loss_is_named_and_never_learned_from(run, batches, tmp_path, value):
    said = r"step 4: NaN or infinity \(rank 0\): loss (nan|inf); .*batch of records r3a, r3b\. The state behind step 2 is kept"
    with pytest.raises(RunError, match=rf"{said}.*ckpt/last-good\.ckpt"):
        run(batches(3, value))
    assert not (tmp_path / "d.safetensors").exists()
    kept = torch.load(tmp_path / "ckpt" / "last-good.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in kept["state_dict"].values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_gradient_is_named(run, batches, value):
    with pytest.raises(RunError, match=r"step 3: .*loss \d.*gradient of edit\.values\.layers-3-up_proj; batch of records r2a, r2b"):
        run(batches(), BadGradient(2, value))


def test_without_the_guard_the_deltas_become_nan(run, batches):
    module = run(batches(3), guard=NumberGuard(enabled=False))
    assert all(value.isnan().all() for value in module.edit.deltas().values())


def test_deltas_that_explode_are_not_what_is_kept(run, batches, tmp_path):
    """The bad step is the one before the loss shows it."""
    with pytest.raises(RunError, match=r"step 3: .*first in what model\.layers\.1\..* gives; .*The state behind step 1 is kept"):
        run(batches(), Explode())
    kept = torch.load(tmp_path / "ckpt" / "last-good.ckpt", weights_only=True)
    assert max(float(value.abs().max()) for value in kept["state_dict"].values()) < 1


class Explode(Callback):
    """Makes the rate of the second step far too large."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            trainer.optimizers[0].param_groups[0]["lr"] = 1e36


def test_nothing_is_kept_where_nothing_was_good(run, batches, tmp_path):
    with pytest.raises(RunError, match=r"step 1: .* Nothing that was learned before it was good"):
        run(batches(0))
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("mode", ["delta", "hook"])
@pytest.mark.parametrize(("accumulate", "bad"), [(1, 4), (2, 5)])
def test_going_on_with_better_batches_is_never_having_stopped(run, batches, tmp_path, accumulate, bad, mode):
    whole = run(batches(), accumulate_grad_batches=accumulate, mode=mode).edit.deltas()
    with pytest.raises(RunError, match=r"loss (\S+, )?nan"):
        run(batches(bad), accumulate_grad_batches=accumulate, mode=mode)
    path = tmp_path / "ckpt" / "last-good.ckpt"
    kept = torch.load(path, weights_only=True)
    assert kept["global_step"] == {1: 3, 2: 1}[accumulate]
    assert any(not torch.equal(value, whole[name]) for name, value in kept["state_dict"].items())
    resumed = run(batches(), ckpt=str(path), accumulate_grad_batches=accumulate, mode=mode)
    assert resumed.trainer.global_step == 6 // accumulate
    for name, value in resumed.edit.deltas().items():
        if mode == "delta":
            assert torch.equal(value, whole[name]), name
        else:  # a checkpoint holds differences of full matrices, which rounds
            assert torch.allclose(value, whole[name], rtol=0, atol=1e-6), name


def test_other_options_win_over_the_checkpoints(run, batches, tmp_path, caplog):
    with pytest.raises(RunError):
        run(batches(4), decay="none", warmup_steps=0)
    path = str(tmp_path / "ckpt" / "last-good.ckpt")
    with caplog.at_level("INFO", "bad_neurons"):
        slower = run(batches(), ckpt=path, lr=0.001, decay="none", warmup_steps=0)
    assert "goes on with --model.lr 0.001 (the checkpoint was saved with 0.01)" in caplog.text
    assert "weight_decay" not in caplog.text
    assert slower.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)
    kept = torch.load(path, weights_only=True)["state_dict"]
    as_before = run(batches(), ckpt=path, decay="none", warmup_steps=0)
    far, near = (max(float((d - kept[n]).abs().max()) for n, d in m.edit.deltas().items()) for m in (as_before, slower))
    assert near < 0.2 * far


def test_a_gradient_scaler_skips_infinite_gradients_itself(run, batches):
    class Scaled(NumberGuard):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            trainer.precision_plugin.scaler = object()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    with pytest.raises(RunError, match=r"step 3: .*gradient of"):
        run(batches(), BadGradient(2, torch.inf))
    with pytest.raises(RunError, match=r"step 4: .*loss nan"):  # there is no real scaler here, so the step was taken
        run(batches(), BadGradient(2, torch.inf), guard=Scaled())
