"""Every kind of edit through one set of demands: clean at the start, scaled, switched off, restored, removed, fitted."""

from __future__ import annotations

import itertools

import lightning as L
import pytest
import torch
from bad_neurons.callbacks import DeltaCheckpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.func import functional_call
from torch.utils.data import DataLoader

from bad_neurons.errors import UserError
from bad_neurons.models.view import view_decoder
from bad_neurons.selection.axes import units
from bad_neurons.tuning.edits import MaskedMatrices, NeuronDelta
from bad_neurons.tuning.full import FullDelta
from bad_neurons.tuning.lora import ALL_MAPS, LoraEdit
from bad_neurons.tuning.module import NeuronTuner
from bad_neurons.tuning.steering import Steering

LENGTHS = ([(5, 4), (9, 2), (7, 7)], [(12, 3), (3, 1), (6, 6)])


def whole_mlps(lm, choose, layers=(1, 3)):
    view = view_decoder(lm.model)
    return choose(lm, "intermediate", {layer: list(range(units(view, "intermediate"))) for layer in layers})


# name: (make, first layer)
KINDS = {
    "neurons": (lambda lm, choose: NeuronDelta(view_decoder(lm.model), choose(lm)), 1),
    "masked": (lambda lm, choose: MaskedMatrices(view_decoder(lm.model), choose(lm)), 1),
    "heads": (lambda lm, choose: NeuronDelta(view_decoder(lm.model), choose(lm, "heads")), 1),
    "mlps": (lambda lm, choose: NeuronDelta(view_decoder(lm.model), whole_mlps(lm, choose)), 1),
    "lora": (lambda lm, choose: LoraEdit(view_decoder(lm.model), [1, 3], 2, ALL_MAPS), 1),
    "full": (lambda lm, choose: FullDelta(view_decoder(lm.model)), 0),
    "steering": (lambda lm, choose: Steering(view_decoder(lm.model), {1: torch.ones(16), 2: torch.arange(16.0)}), 1),
}
LEARNING = [kind for kind in KINDS if kind != "steering"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def made(tiny, choose):
    """``made(kind, family)``: a tiny model and an edit of it."""

    def make(kind, family="gemma2", seed=0):
        lm = tiny(family, seed)
        return lm, KINDS[kind][0](lm, choose)

    return make


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def randomise(edit, seed=5, size=0.2):
    generator = torch.Generator().manual_seed(seed)
    edit.restore({name: size * torch.randn(value.shape, generator=generator) for name, value in edit.deltas().items()})
    return edit


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "qwen2"], indirect=True)
def test_scaling(made, kind, family, tiny, ids):
    clean = logits(tiny(family).model, ids)
    lm, edit = made(kind, family)
    assert edit.first_layer == KINDS[kind][1]
    if kind != "steering":  # whose change is given
        assert torch.equal(logits(lm.model, ids), clean)
    randomise(edit)
    changed = logits(lm.model, ids)
    assert (changed - clean).abs().max() > 0.02
    with edit.disabled():
        assert torch.equal(logits(lm.model, ids), clean)
        with edit.scaled(3.0):
            assert torch.equal(logits(lm.model, ids), clean)
    with edit.scaled(0.0):
        assert torch.equal(logits(lm.model, ids), clean)
    with edit.scaled(1.0):
        assert torch.equal(logits(lm.model, ids), changed)
    with edit.scaled(0.5):
        half = logits(lm.model, ids)
        with edit.scaled(2.0):
            torch.testing.assert_close(logits(lm.model, ids), changed, rtol=1e-5, atol=1e-5)
        with edit.disabled():
            assert torch.equal(logits(lm.model, ids), clean)
    assert torch.equal(logits(lm.model, ids), changed)
    with pytest.raises(ZeroDivisionError), edit.scaled(0.5):
        raise ZeroDivisionError
    assert torch.equal(logits(lm.model, ids), changed)
    # what counts half is what has half the change (of LoRA: half of one factor)
    edit.restore({name: value / (1 if name.endswith(".A") else 2) for name, value in edit.deltas().items()})
    torch.testing.assert_close(half, logits(lm.model, ids), rtol=1e-5, atol=1e-5)
    assert (half - changed).abs().max() > 0.01


def test_removed(made, kind, tiny, ids):
    before = tiny().model
    lm, edit = made(kind)
    randomise(edit)
    edit.remove()
    assert torch.equal(logits(lm.model, ids), logits(before, ids))
    assert [(name, type(m)) for name, m in lm.model.named_modules()] == [(name, type(m)) for name, m in before.named_modules()]
    assert not any(m._forward_hooks for m in lm.model.modules())
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert view_decoder(lm.model).d_mlp == 24


def test_restored_in_another_model(made, kind, ids):
    lm, edit = made(kind)
    randomise(edit)
    other, theirs = made(kind)
    theirs.restore(edit.deltas())
    assert torch.equal(logits(other.model, ids), logits(lm.model, ids))
    assert (edit.digest, edit.deltas().keys()) == (theirs.digest, theirs.deltas().keys())
    assert all(value.dtype == torch.float32 for value in edit.deltas().values())
    wrong = dict(itertools.islice(edit.deltas().items(), len(edit.deltas()) - 1))
    with pytest.raises(UserError, match="delta: it was trained with another set"):
        theirs.restore(wrong)


def test_digests_differ(made):
    assert len({made(kind)[1].digest for kind in KINDS}) == len(KINDS) - 1  # neurons and masked matrices are two forms of one edit


@pytest.fixture
def fitted(made, make_batch, quiet):
    """``fitted(kind, **options)``: model, tuner and edit behind six steps of AdamW with weight decay."""

    def run(kind, callbacks=(), seed=0, ckpt=None, epochs=2, **options):
        lm, edit = made(kind, seed=seed)
        tuner = NeuronTuner.of(lm, **{"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 0, **options})
        assert tuner.attach(edit) is edit
        batches = [make_batch(LENGTHS[i % 2], [11], seed=i) for i in range(3)]
        trainer = L.Trainer(
            **{**quiet, "max_epochs": epochs, "enable_checkpointing": bool(callbacks)}, callbacks=list(callbacks), limit_val_batches=0
        )
        loader = DataLoader(batches, batch_size=None)
        trainer.fit(tuner, loader, loader, ckpt_path=ckpt)
        return lm, tuner, edit

    return run


@pytest.mark.parametrize("kind", LEARNING, indirect=True)
def test_a_fit_moves_what_may_learn_and_nothing_else(fitted, kind, tiny, ids, make_batch):
    before = dict(tiny().model.named_parameters())
    lm, tuner, edit = fitted(kind)
    assert tuner.trainer.global_step == 6
    assert all(value.abs().max() > 1e-3 for value in edit.deltas().values())
    batch = make_batch(LENGTHS[0], [11])
    learned = tuner.losses(batch).loss.item()
    with edit.disabled():
        assert torch.equal(logits(lm.model, ids), logits(tiny().model, ids))
        assert learned < tuner.losses(batch).loss.item()
    edit.remove()
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def dense(name, weight, delta, chosen, axis):
    """The whole change [out, in] that the tensor ``name`` of a neuron or head edit stands for."""
    layer, matrix = int(name.split(".")[1]), name.split(".")[2]
    width = 8 if axis == "heads" else 1
    at = torch.tensor([index * width + i for index in chosen[layer] for i in range(width)])
    rows = {"residual": ["down_proj"], "intermediate": ["gate_proj", "up_proj"], "heads": ["q_proj"]}[axis]
    return torch.zeros_like(weight).index_copy(0 if matrix in rows else 1, at, delta)


def dense_changes(edit, weights, leaves):
    """Change of each weight of the model, made of ``leaves`` (the tensors of ``edit``), by name in the model."""
    parent = {name: ("self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp") for name in ALL_MAPS}
    if isinstance(edit, FullDelta):
        return {f"model.{name}": leaf for name, leaf in leaves.items()}
    place = {name: f"model.{a}.{b}.{parent[c]}.{c}.weight" for name in leaves for a, b, c in [name.split(".")[:3]]}
    if isinstance(edit, LoraEdit):
        names = {name[:-2] for name in leaves}
        return {place[f"{name}.A"]: leaves[f"{name}.B"] @ leaves[f"{name}.A"] for name in names}
    chosen, axis = edit.selection.layers, edit.selection.axis
    return {place[name]: dense(name, weights[place[name]], leaf, chosen, axis) for name, leaf in leaves.items()}


@pytest.mark.parametrize("family", ["gemma3", "qwen2"], indirect=True)
@pytest.mark.parametrize("kind", ["neurons", "heads", "mlps", "lora", "full"], indirect=True)
def test_function_and_gradient_are_those_of_dense_matrices(made, kind, family, tiny, ids):
    lm, edit = made(kind, family)
    randomise(edit)
    with edit.scaled(0.7):
        found = lm.model(input_ids=ids).logits
        found.logsumexp(-1).sum().backward()
    model = tiny(family).model
    weights, leaves = dict(model.named_parameters()), {name: value.clone().requires_grad_() for name, value in edit.deltas().items()}
    changes = dense_changes(edit, weights, leaves)
    expected = functional_call(
        model, {name: weights[name] + 0.7 * change for name, change in changes.items()}, (), {"input_ids": ids}
    ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected.logsumexp(-1).sum().backward()
    for (name, leaf), parameter in zip(leaves.items(), edit.trainable(), strict=True):
        assert parameter.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, leaf.grad, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_in_bfloat16_the_change_is_float32(tiny, choose, kind, ids):
    lm = tiny()
    lm.model.bfloat16()
    clean = logits(lm.model, ids)
    edit = KINDS[kind][0](lm, choose)
    if kind != "steering":
        assert torch.equal(logits(lm.model, ids), clean)
    randomise(edit)
    changed = logits(lm.model, ids)
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, clean)
    assert {value.dtype for value in edit.deltas().values()} == {torch.float32}
    assert {p.dtype for p in edit.trainable()} <= {torch.bfloat16 if kind == "masked" else torch.float32}
    with edit.disabled():
        assert torch.equal(logits(lm.model, ids), clean)


def test_parameter_counts(made):
    # by hand for d 16, m 24, four layers, two query heads of size 8 with one key-value head, in Gemma 2 with its four norms
    expected = {
        "neurons": 4 * 3 * 24,
        "heads": 3 * 2 * 8 * 16,
        "mlps": 2 * 3 * 16 * 24,
        "lora": 2 * 2 * ((16 + 16) * 2 + (16 + 8) * 2 + 3 * (16 + 24)),
        "full": 4 * (3 * 16 * 24 + 2 * 16 * 16 + 2 * 8 * 16 + 4 * 16),
        "steering": 0,
    }
    assert {kind: sum(p.numel() for p in made(kind)[1].trainable()) for kind in expected} == expected


def test_a_tuner_refuses_what_does_not_learn(made, quiet, make_batch):
    lm, edit = made("steering")
    tuner = NeuronTuner.of(lm)
    tuner.attach(edit)
    assert tuner.losses(make_batch(LENGTHS[0])).kl.item() > 0.01
    with pytest.raises(UserError, match="nothing in Steering learns"):
        tuner.configure_optimizers()


def test_a_delta_file_is_for_neurons(fitted, tmp_path):
    with pytest.raises(UserError, match="LoraEdit has no chosen neurons"):
        fitted("lora", [DeltaCheckpoint(str(tmp_path / "delta.safetensors"))])
    assert not (tmp_path / "delta.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("kind", ["lora", "full"], indirect=True)
def test_going_on_is_never_having_stopped(fitted, kind, tmp_path):
    def keep():
        return ModelCheckpoint(tmp_path / kind, "{epoch}", save_top_k=-1)

    _, _, whole = fitted(kind, [keep()])
    content = torch.load(tmp_path / kind / "epoch=0.ckpt", weights_only=True)
    assert content["state_dict"].keys() == whole.deltas().keys()
    _, _, resumed = fitted(kind, [keep()], ckpt=str(tmp_path / kind / "epoch=0.ckpt"))
    assert all(torch.equal(resumed.deltas()[name], value) for name, value in whole.deltas().items())
    with pytest.raises(UserError, match="the checkpoint belongs to other neurons"):
        fitted("heads", [keep()], ckpt=str(tmp_path / kind / "epoch=0.ckpt"))
