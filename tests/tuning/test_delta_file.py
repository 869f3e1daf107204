"""Delta files: on a live model, merged, and refused."""

from __future__ import annotations

import pytest
import torch

from bad_neurons import load_delta
from bad_neurons.artifacts import write_tensors
from bad_neurons.errors import UserError
from bad_neurons.formats import DELTA as FORMAT
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.delta_file import merge_delta, read_delta, write_delta
from bad_neurons.tuning.edits import NeuronDelta


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(params=["residual", "intermediate", "heads"])
def saved(request, tiny, choose, tmp_path):
    """A file with random deltas of the tiny Gemma 2, and the deltas."""
    lm = tiny()
    selection = choose(lm, request.param)
    edit = NeuronDelta(view_decoder(lm.model), selection)
    deltas = {name: 0.3 * torch.randn_like(value) for name, value in edit.deltas().items()}
    write_delta(tmp_path / "delta.safetensors", selection, deltas)
    return tmp_path / "delta.safetensors", selection, deltas


def test_round_trip(saved):
    path, selection, deltas = saved
    content = read_delta(path)
    assert content.selection == selection
    assert content.deltas.keys() == deltas.keys()
    assert all(torch.equal(content.deltas[name], value) for name, value in deltas.items())


def test_merged_weights_are_the_same_function(saved, tiny, ids):
    path, selection, _ = saved
    live, merged = tiny().model, tiny().model
    clean = logits(live, ids)
    with load_delta(live, path):
        changed = logits(live, ids)
    assert (changed - clean).abs().max() > 0.05
    assert merge_delta(merged, path) == selection
    torch.testing.assert_close(logits(merged, ids), changed, rtol=1e-5, atol=1e-5)


def test_merging_touches_the_chosen_weights_alone(saved, tiny):
    path, selection, deltas = saved
    before, after = tiny().model.state_dict(), tiny().model
    merge_delta(after, path)
    for name, weight in after.state_dict().items():
        change = (weight - before[name]).count_nonzero()
        short = name.removeprefix("model.").replace("mlp.", "").replace("self_attn.", "").removesuffix(".weight")
        assert change == (deltas[short].numel() if short in deltas else 0), name
    assert selection.count == (3 if selection.axis == "heads" else 4)


def test_a_live_delta_comes_off(saved, tiny, ids):
    path, selection, _ = saved
    model = tiny().model
    clean = logits(model, ids)
    with load_delta(model, path) as delta:
        assert delta.selection == selection
        changed = logits(model, ids)
        assert not torch.equal(changed, clean)
        with delta.disabled():
            assert torch.equal(logits(model, ids), clean)
        assert torch.equal(logits(model, ids), changed)
    assert torch.equal(logits(model, ids), clean)
    with pytest.raises(ZeroDivisionError), load_delta(model, path):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), clean)
    load_delta(model, path).remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_live_delta_does_not_learn(saved, tiny, ids):
    model = tiny().model
    with load_delta(model, saved[0]):
        assert not model(input_ids=ids).logits.requires_grad


@pytest.mark.parametrize("use", [load_delta, merge_delta])
def test_another_model_is_refused(saved, tiny, ids, use):
    model = tiny(seed=1).model
    before = logits(model, ids)
    with pytest.raises(UserError, match="run `bad-neurons select` with this model"):
        use(model, saved[0])
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("use", [load_delta, merge_delta])
@pytest.mark.parametrize("size", [0, 5, 100, -10])
def test_a_truncated_file_is_refused(saved, tiny, use, size):
    whole = saved[0].read_bytes()
    saved[0].write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"delta\.safetensors: cannot be read as bad-neurons/delta/2"):
        use(tiny().model, saved[0])


@pytest.mark.parametrize("use", [load_delta, merge_delta])
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_the_list_are_refused(saved, tiny, ids, use, change):
    path, selection, deltas = saved
    matrix = "o_proj" if selection.axis == "heads" else "down_proj"
    if change == "missing":
        del deltas[f"layers.3.{matrix}"]
    else:
        deltas[f"layers.{3 if change == 'shape' else 2}.{matrix}"] = torch.ones(2, 3)
    write_delta(path, selection, deltas)
    model = tiny().model
    before = logits(model, ids)
    with pytest.raises(UserError, match="its tensors do not fit its own list of neurons"):
        use(model, path)
    assert torch.equal(logits(model, ids), before)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "format None is of an older version; expected"),
        ({"format": "other/1"}, "format 'other/1'; expected"),
        ({"format": FORMAT}, "format 'NoneType'"),
        ({"format": FORMAT, "selection": {"format": "x"}}, "format 'x'"),
    ],
)
def test_other_files_are_refused(tmp_path, metadata, said):
    write_tensors(tmp_path / "delta.safetensors", {"a": torch.ones(2)}, metadata)
    with pytest.raises(UserError, match=said):
        read_delta(tmp_path / "delta.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        read_delta(tmp_path / "nothing.safetensors")
