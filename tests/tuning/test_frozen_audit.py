"""FrozenAudit: a moved bit outside the choice is found and named, and nothing of such a fit is kept."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from bad_neurons.callbacks import DeltaCheckpoint, FrozenAudit, GradientMask
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from bad_neurons.errors import RunError, UserError
from bad_neurons.tuning.edits import EDITS, MaskedMatrices, NeuronDelta
from bad_neurons.tuning.frozen import frozen_checksums, frozen_tensors, moved
from bad_neurons.tuning.full import FullDelta
from bad_neurons.tuning.lora import LoraEdit

LENGTHS = [(5, 4), (9, 2)]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flip(tensor, place, bit=0):
    """Turn one bit round, in place."""
    with torch.no_grad():
        bits = tensor.data.view(INTEGERS[tensor.element_size()])
        flat = bits.flatten()
        flat[place] ^= torch.tensor(-(2**bit) if bit == 8 * tensor.element_size() - 1 else 2**bit, dtype=bits.dtype)
        bits.copy_(flat.view(bits.shape))


class Fault(Callback):
    """Flips a bit of a parameter of the model behind a step."""

    def __init__(self, name, place=0, step=2, bit=0):
        self.name, self.place, self.step, self.bit = name, place, step, bit

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            flip(pl_module.get_parameter(self.name), self.place, self.bit)


@pytest.fixture
def run(tmp_path, tuner, neurons, make_batch, quiet):
    """``run(*callbacks, audit=..., mode=...)``: a fit of six steps with a checkpoint every other step; gives the module."""

    def fit(*callbacks, audit=None, mode="delta", axis="residual", edit=None, **options):
        module = tuner(lr=0.01, weight_decay=0.1)
        attach = [] if edit else [GradientMask(neurons(axis), mode)]
        if edit:
            module.attach(edit(module.view))
        writers = [] if edit else [DeltaCheckpoint(str(tmp_path / "delta.safetensors"))]
        keep = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=2)
        trainer = L.Trainer(
            **{**quiet, "enable_checkpointing": True}, max_epochs=1, limit_val_batches=0,
            callbacks=[*attach, *writers, *callbacks, *([audit] if audit else []), keep], **options,
        )  # fmt: skip
        batches = [make_batch(LENGTHS, [11], seed=i) for i in range(6)]
        loader = DataLoader(batches, batch_size=None)
        trainer.fit(module, loader, loader)
        return module

    return fit


def checkpoints(folder):
    return sorted(path.stem for path in folder.glob("*.ckpt"))


pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # some tests fit twice
UP = "lm.model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize("mode", ["delta", "hook"])
@pytest.mark.parametrize("axis", ["residual", "intermediate", "heads"])
def test_a_sound_fit_passes(run, tmp_path, mode, axis):
    module = run(audit=FrozenAudit(every_n_steps=1), mode=mode, axis=axis)
    assert all(value.abs().max() > 1e-3 for value in module.edit.deltas().values())  # it did learn
    assert (tmp_path / "delta.safetensors").is_file()
    assert checkpoints(tmp_path / "ckpt") == ["step=2", "step=4", "step=6"]


@pytest.mark.parametrize("edit", [lambda view: LoraEdit(view, [1, 3], 2), lambda view: FullDelta(view, [1, 3])], ids=["lora", "full"])
def test_other_corrections(run, edit, tmp_path):
    module = run(audit=FrozenAudit(), edit=edit)
    assert max(value.abs().max() for value in module.edit.deltas().values()) > 1e-3
    base = "base_layer." if isinstance(module.edit, LoraEdit) else ""
    name = f"lm.model.layers.3.mlp.up_proj.{base}weight"
    with pytest.raises(RunError, match=rf"frozen weights changed between step 4 and step 6: {name} \(rank 0\)"):
        run(Fault(name, step=5), audit=FrozenAudit(), edit=edit)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("bit", [0, 31])
def test_a_flipped_bit_ends_the_fit_with_its_name(run, tmp_path, place, bit):
    with pytest.raises(RunError, match=rf"changed between step 2 and step 4: {UP} \(rank 0\)"):
        run(Fault(UP, place, 3, bit), audit=FrozenAudit())
    assert not (tmp_path / "delta.safetensors").exists()
    assert checkpoints(tmp_path / "ckpt") == ["step=2"]  # that of step 4 would rest on another model


def test_a_bit_that_moves_behind_the_last_checkpoint(run, tmp_path):
    class AtTheEnd(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            flip(pl_module.get_parameter(UP), 7)

    with pytest.raises(RunError, match=rf"between step 6 and step 6: {UP}"):
        run(AtTheEnd(), audit=FrozenAudit())
    assert not (tmp_path / "delta.safetensors").exists()


def test_without_the_audit_nobody_sees_it(run, tmp_path):
    run(Fault(UP), audit=FrozenAudit(enabled=False))
    assert (tmp_path / "delta.safetensors").is_file()
    (tmp_path / "delta.safetensors").unlink()
    run(Fault(UP))
    assert (tmp_path / "delta.safetensors").is_file()


def test_every_n_steps(run):
    with pytest.raises(RunError, match=r"between step 2 and step 3"):
        run(Fault(UP, step=3), audit=FrozenAudit(every_n_steps=1))
    with pytest.raises(UserError, match=r"--audit\.every_n_steps -1: at least 0"):
        FrozenAudit(every_n_steps=-1)


def test_accumulated_batches_are_one_step(run, monkeypatch):
    calls = []
    monkeypatch.setattr("bad_neurons.callbacks.frozen_audit.frozen_checksums", lambda *a: calls.append(1) or frozen_checksums(*a))
    run(audit=FrozenAudit(every_n_steps=1), accumulate_grad_batches=2)
    assert len(calls) == 1 + 3 + 1  # before, behind each of three steps (checkpoints find it done), behind the fit


def test_many_are_counted(run):
    class All(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            for layer in range(4):
                flip(pl_module.get_parameter(f"lm.model.layers.{layer}.mlp.up_proj.weight"), 3)

    said = r"layers\.0\.mlp\.up_proj\.weight, .*layers\.1\.\S+, .*layers\.2\.mlp\.up_proj\.weight and 1 more \(rank 0\)"
    with pytest.raises(RunError, match=said):
        run(All(), audit=FrozenAudit())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["delta", "hook"])
def test_any_bit_of_any_frozen_tensor_is_named(tuner, tiny, choose, mode, dtype):
    """First and last value, lowest and highest bit (of a zero: its sign alone), a NaN's payload: each alone, and taken back."""
    module = tuner(dtype=dtype)
    module.attach(EDITS[mode](module.view, choose(tiny())))
    with torch.no_grad():
        module.lm.model.layers[0].mlp.up_proj.weight.flatten()[0].zero_()
        module.lm.model.layers[0].mlp.up_proj.weight.flatten()[5].fill_(torch.nan)
    before = frozen_checksums(module, module.edit)
    found = 0
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        if any(tensor is p for p in module.edit.trainable()):
            continue
        top = 8 * tensor.element_size() - 1
        for place in (0, tensor.numel() - 1, *((5,) if name.endswith("layers.0.mlp.up_proj.weight") else ())):
            for bit in (0, top):
                flip(tensor, place, bit)
                assert moved(before, frozen_checksums(module, module.edit)) == [name]
                flip(tensor, place, bit)
                found += 1
    assert moved(before, frozen_checksums(module, module.edit)) == []
    assert found > 80


@pytest.mark.parametrize("axis", ["residual", "intermediate", "heads"])
def test_the_mask_form_looks_outside_the_chosen_rows_and_columns_alone(tuner, tiny, choose, axis):
    module = tuner()
    module.attach(MaskedMatrices(module.view, choose(tiny(), axis)))
    before = frozen_checksums(module, module.edit)
    assert len(before) == len([*module.named_parameters(), *module.named_buffers()])  # each, wholly or in part
    for weight, (dim, index) in module.edit.chosen().items():
        name = next(n for n, p in module.named_parameters() if p is weight)
        named = f"{name} (outside the chosen {('rows', 'columns')[dim]})"
        height, width = weight.shape
        for place in (*range(width), *range(width, height * width, width + 1)):  # every row and every column is met
            at = divmod(place, width)[dim]
            flip(weight, place)
            assert moved(before, frozen_checksums(module, module.edit)) == ([] if at in index.tolist() else [named])
            flip(weight, place)


def test_what_is_frozen_beside_a_delta(tuner, tiny, choose):
    module = tuner()
    module.attach(NeuronDelta(module.view, choose(tiny())))
    names = {name for name, _ in frozen_tensors(module, module.edit)}
    model = {f"lm.{name}" for name, _ in [*module.lm.named_parameters(), *module.lm.named_buffers()]}
    indices = {f"edit.index-layers-{layer}-{matrix}" for layer in (1, 3) for matrix in ("gate_proj", "up_proj", "down_proj")}
    assert names == model | indices


def test_all_ranks_stop_where_one_finds_something(run, tmp_path):
    class OtherRank(FrozenAudit):
        def on_train_end(self, trainer, pl_module):
            trainer.strategy.reduce_boolean_decision = lambda decision, all: decision and False  # what the others' vote makes of it
            super().on_train_end(trainer, pl_module)

    with pytest.raises(RunError, match=r"between step 6 and step 6: on another rank\."):
        run(audit=OtherRank())
    assert not (tmp_path / "delta.safetensors").exists()
