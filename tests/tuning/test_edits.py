"""The two forms of an edit, against each other and against merged weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bad_neurons.errors import UserError
from bad_neurons.models.view import view_decoder
from bad_neurons.selection.axes import PARTS, owned
from bad_neurons.tuning.edits import EDITS, MaskedMatrices, NeuronDelta, check_fits

MODES, AXES = ["delta", "hook"], ["residual", "intermediate", "heads"]

# By hand for d 16, m 24, two heads of size 8, and the neurons {1: [0, 5, 15], 3: [2]} and heads {1: [0, 1], 3: [1]} of conftest.
SHAPES = {
    "residual": {"gate_proj": lambda k: (24, k), "up_proj": lambda k: (24, k), "down_proj": lambda k: (k, 24)},
    "intermediate": {"gate_proj": lambda k: (k, 16), "up_proj": lambda k: (k, 16), "down_proj": lambda k: (16, k)},
    "heads": {"q_proj": lambda k: (k, 16), "o_proj": lambda k: (16, k)},
}
FULL = {
    "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    "self_attn.q_proj": (16, 16), "self_attn.o_proj": (16, 16),
}  # fmt: skip
COUNTS = {"residual": {1: 3, 3: 1}, "intermediate": {1: 3, 3: 1}, "heads": {1: 16, 3: 8}}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def random_deltas(edit, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in edit.deltas().items()}


def edited(lm, selection, mode):
    edit = EDITS[mode](view_decoder(lm.model), selection)
    edit.restore(random_deltas(edit))
    return edit


def learning(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("axis", AXES)
def test_what_learns_in_delta_form(tiny, choose, axis):
    lm = tiny()
    edit = NeuronDelta(view_decoder(lm.model), choose(lm, axis))
    expected = {f"values.layers-{layer}-{name}": shape(k) for layer, k in COUNTS[axis].items() for name, shape in SHAPES[axis].items()}
    assert learning(edit) == expected
    assert [id(p) for p in edit.trainable()] == [id(p) for p in edit.parameters()]
    assert learning(lm.model) == {}
    assert all(p.dtype == torch.float32 for p in edit.trainable())
    assert {name: tuple(v.shape) for name, v in edit.deltas().items()} == {
        k.removeprefix("values.").replace("-", "."): v for k, v in expected.items()
    }


@pytest.mark.parametrize("axis", AXES)
def test_what_learns_in_hook_form(tiny, choose, axis):
    lm = tiny()
    edit = MaskedMatrices(view_decoder(lm.model), choose(lm, axis))
    expected = {
        f"model.layers.{layer}.{path}.weight": shape
        for layer in (1, 3)
        for path, shape in FULL.items()
        if path.partition(".")[2] in SHAPES[axis]
    }
    assert learning(lm.model) == expected
    assert {id(p) for p in edit.trainable()} == {id(p) for p in lm.model.parameters() if p.requires_grad}
    assert {name: tuple(v.shape) for name, v in edit.deltas().items()} == {
        f"layers.{layer}.{name}": shape(k) for layer, k in COUNTS[axis].items() for name, shape in SHAPES[axis].items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_new_edit_changes_nothing(tiny, choose, mode, ids):
    lm = tiny()
    before = logits(lm.model, ids)
    EDITS[mode](view_decoder(lm.model), choose(lm))
    assert torch.equal(logits(lm.model, ids), before)


@pytest.mark.parametrize("axis", AXES)
def test_both_forms_are_the_same_function(tiny, choose, axis, ids, family):
    outputs = []
    for mode in MODES:
        lm = tiny(family)
        clean = logits(lm.model, ids)
        edit = edited(lm, choose(lm, axis), mode)
        outputs.append(logits(lm.model, ids))
        assert (outputs[-1] - clean).abs().max() > 0.02
        for name, value in random_deltas(edit).items():
            torch.testing.assert_close(edit.deltas()[name], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_both_forms_have_the_same_gradient(tiny, choose, axis, ids):
    gradients = []
    for mode in MODES:
        lm = tiny()
        selection = choose(lm, axis)
        edit = edited(lm, selection, mode)
        lm.model(input_ids=ids).logits.logsumexp(-1).sum().backward()
        found = {}
        for (name, _), parameter in zip(edit.deltas().items(), edit.trainable(), strict=True):
            gradient, chosen = parameter.grad, selection.layers[int(name.split(".")[1])]
            index = torch.tensor(owned(view_decoder(lm.model), axis, chosen))
            if mode == "hook":
                dim = next(part.dim for part in PARTS[axis] if part.matrix == name.split(".")[2])
                outside = torch.ones(gradient.shape[dim], dtype=torch.bool).index_fill(0, index, False).nonzero().squeeze(-1)
                assert not gradient.index_select(dim, outside).any()
                gradient = gradient.index_select(dim, index)
            found[name] = gradient
        gradients.append(found)
    assert min(g.abs().max() for g in gradients[0].values()) > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_disabled_is_the_clean_model_bit_for_bit(tiny, choose, mode, ids):
    lm = tiny()
    clean = logits(lm.model, ids)
    edit = edited(lm, choose(lm), mode)
    changed = logits(lm.model, ids)
    assert not torch.equal(changed, clean)
    with edit.disabled():
        assert torch.equal(logits(lm.model, ids), clean)
        with edit.disabled():
            pass
        assert torch.equal(logits(lm.model, ids), clean)
    assert torch.equal(logits(lm.model, ids), changed)
    with pytest.raises(ZeroDivisionError), edit.disabled():
        raise ZeroDivisionError
    assert torch.equal(logits(lm.model, ids), changed)


@pytest.mark.parametrize("mode", MODES)
def test_remove(tiny, choose, mode, ids):
    lm = tiny()
    clean = logits(lm.model, ids)
    edit = edited(lm, choose(lm), mode)
    assert not torch.equal(logits(lm.model, ids), clean)
    edit.remove()
    assert torch.equal(logits(lm.model, ids), clean)
    assert learning(lm.model) == {}
    assert not any(m._forward_hooks for m in lm.model.modules())
    assert not any(p._backward_hooks for p in lm.model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_restore_refuses_other_neurons_and_changes_nothing(tiny, choose, mode):
    lm = tiny()
    edit = edited(lm, choose(lm), mode)
    before = {name: value.clone() for name, value in edit.deltas().items()}
    longer = {**before, "layers.1.gate_proj": torch.ones(24, 4)}
    fewer = {name: value for name, value in before.items() if name != "layers.3.up_proj"}
    for wrong in (longer, fewer, {**before, "layers.2.up_proj": torch.ones(24, 1)}, {}):
        with pytest.raises(UserError, match="another set of neurons"):
            edit.restore(wrong)
    assert all(torch.equal(edit.deltas()[name], value) for name, value in before.items())


def test_masked_matrices_put_everything_outside_back(tiny, choose):
    lm = tiny()
    weight = view_decoder(lm.model).layers[3].matrix("down_proj").weight
    before = weight.detach().clone()
    edit = MaskedMatrices(view_decoder(lm.model), choose(lm))
    with torch.no_grad():
        weight.add_(1.0)
    edit.after_step()
    moved = (weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [2]
    assert torch.equal(weight[2], before[2] + 1)


def test_deltas_of_a_bfloat16_model_are_float32(tiny, choose, ids):
    lm = tiny()
    lm.model.bfloat16()
    edit = NeuronDelta(view_decoder(lm.model), choose(lm))
    clean = logits(lm.model, ids)
    edit.restore(random_deltas(edit))
    assert logits(lm.model, ids).dtype == torch.bfloat16
    assert not torch.equal(logits(lm.model, ids), clean)
    assert {v.dtype for v in edit.deltas().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 24}, r"chosen in .* \(24 on axis residual\), but this model has 4 layers of 16"),
        ({"layers": {4: [1]}}, "this model has 4 layers of 16"),
        ({"model_digest": "0" * 64}, "digest 000000000000, but this model's is"),
        ({"axis": "intermediate"}, r"\(16 on axis intermediate\), but this model has 4 layers of 24"),
    ],
)
def test_neurons_of_another_model_are_refused(tiny, choose, changes, said):
    lm = tiny()
    check_fits(view_decoder(lm.model), choose(lm), lm.digest)
    with pytest.raises(UserError, match=said):
        check_fits(view_decoder(lm.model), replace(choose(lm), **changes), lm.digest)
