"""Partial forward passes against transformers' own."""

from __future__ import annotations

import shutil

import pytest
import torch

from bad_neurons.batching import pack, pack_sequences, prefix_tree
from bad_neurons.models.passes import (
    before_and_after,
    checkpointed,
    compiled,
    final_hidden,
    finish,
    open_frame,
    plain,
    run_layers,
    visit_mlp_outputs,
)
from bad_neurons.models.view import view_decoder
from bad_neurons.testing import tiny_model
from bad_neurons.tuning.edits import NeuronDelta

LENGTHS = (12, 20, 9)  # both sides of the sliding window of 8


@pytest.fixture
def sequences():
    """Three token sequences of unequal lengths."""
    return [torch.randint(3, 259, (n,)).tolist() for n in LENGTHS]


def by_transformers(model, sequence):
    """Final hidden states [T, d] of one sequence alone, in one ordinary pass."""
    ids = torch.tensor([sequence])
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


def everywhere(rows):
    """All flat places of rows."""
    return torch.arange(rows.input_ids.numel())


def mlp_outputs(view, rows, layers):
    found = {}
    visit_mlp_outputs(view, rows, layers, found.__setitem__)
    return found


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


def count_calls(module, calls):
    return module.register_forward_pre_hook(lambda *_: calls.append(module))


def test_logits_are_those_of_transformers(family, ids):
    model = tiny_model(family)
    view = view_decoder(model)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    rows = pack_sequences(ids.tolist())
    ours = view.logits(final_hidden(view, rows, everywhere(rows))).view_as(theirs)
    assert theirs.std() > 0.1  # not a flat distribution
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_soft_cap_is_inside():
    view = view_decoder(tiny_model("gemma2"))
    hidden = 20 * torch.randn(7, 16)
    bare = hidden @ view.head.weight.T
    assert bare.abs().max() > 20
    torch.testing.assert_close(view.logits(hidden), 5 * torch.tanh(bare / 5))
    assert view.logits(hidden).abs().max() <= 5


def test_logits_are_float32_whatever_the_model_is():
    view = view_decoder(tiny_model("gemma2").bfloat16())
    assert view.logits(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_right_padding_changes_nothing(family, sequences):
    model = tiny_model(family)
    view, rows = view_decoder(model), pack_sequences(sequences)
    final = final_hidden(view, rows, everywhere(rows)).view(3, 20, 16)
    recorded = mlp_outputs(view, rows, [0, 2])
    for number, sequence in enumerate(sequences):
        torch.testing.assert_close(final[number, : len(sequence)], by_transformers(model, sequence), rtol=1e-4, atol=1e-4)
        for layer, output in mlp_outputs(view, pack_sequences([sequence]), [0, 2]).items():
            torch.testing.assert_close(recorded[layer][number, : len(sequence)], output[0], rtol=1e-4, atol=1e-4)


def test_what_stands_in_the_padding_changes_nothing(family):
    view = view_decoder(tiny_model(family))
    rows = pack_sequences([list(range(10, 22)), list(range(30, 50))])
    other = rows._replace(input_ids=rows.input_ids.masked_fill(rows.attention_mask == 0, 77))
    assert not torch.equal(rows.input_ids, other.input_ids)
    assert torch.equal(*(final_hidden(view, r, torch.arange(12)) for r in (rows, other)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("width", [0, 80])
def test_shared_rows_give_each_sequence_what_it_gets_alone(family, attention, width):
    model = tiny_model(family)
    if family != "gemma2" or attention == "eager":  # sdpa has no soft cap
        model.set_attn_implementation(attention)
    view, start = view_decoder(model), list(range(20, 37))  # longer than the sliding window of 8
    forest = [
        [[*start, 5, 6, 7], [*start, 5, 9], [*start[:10], *range(100, 112)], [*start, 5, 6, 7]],
        [[9, 8, 7], [9, 8, 5, 5]],
        [[40] * 15],
    ]
    trees = [prefix_tree(sequences) for sequences in forest]
    rows, starts = pack(trees, width)
    assert rows.branched
    assert len(rows.input_ids) == (1 if width else 3)
    for sequences, tree, at in zip(forest, trees, starts, strict=True):
        for sequence, path in zip(sequences, tree.paths, strict=True):
            found = final_hidden(view, rows, torch.tensor(path) + at)
            torch.testing.assert_close(found, by_transformers(model, sequence), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("branched", [False, True])
def test_replay_is_the_full_pass_bit_for_bit(family, first, branched, sequences):
    view = view_decoder(tiny_model(family))
    rows = (
        pack([prefix_tree([sequences[0], [*sequences[0][:9], 4]]), prefix_tree(sequences[1:2])]).rows
        if branched
        else pack_sequences(sequences)
    )
    assert rows.branched is branched
    at = rows.attention_mask.flatten().nonzero().squeeze(-1)
    with torch.no_grad():
        frame = open_frame(view, rows)
        hidden = run_layers(view, frame, frame.embedded, last=first)
        replayed = finish(view, open_frame(view, rows), hidden, first, at)
    assert torch.equal(replayed, final_hidden(view, rows, at))


def test_plain_rows_are_the_model_s_own_pass_bit_for_bit(family, ids):
    view = view_decoder(tiny_model(family))
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    rows = pack_sequences([row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)])
    with torch.no_grad():
        theirs = view.backbone(input_ids=rows.input_ids, attention_mask=mask).last_hidden_state
    assert torch.equal(final_hidden(view, rows, everywhere(rows)).view_as(theirs), theirs)


def test_replay_sees_a_change_behind_its_first_layer_and_carries_gradients(ids):
    view = view_decoder(tiny_model("gemma3"))
    rows = pack_sequences(ids.tolist())
    frame = open_frame(view, rows)
    hidden = run_layers(view, frame, frame.embedded, last=2).detach()
    clean = final_hidden(view, rows, everywhere(rows))
    weight = view.layers[3].matrix("down_proj").weight
    with torch.no_grad():
        weight.mul_(1.5)
    changed = finish(view, frame, hidden, 2, everywhere(rows))
    assert not torch.allclose(changed, clean)
    torch.testing.assert_close(changed, view.backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.flatten(0, 1))
    changed.sum().backward()
    assert weight.grad is not None
    assert view.layers[1].matrix("down_proj").weight.grad is None


def test_the_last_layer_runs_its_mlp_at_the_places_alone(family, sequences):
    view, seen = view_decoder(tiny_model(family)), []
    rows = pack_sequences(sequences)
    for part in view.layers:
        part.mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    final_hidden(view, rows, torch.tensor([3, 7]))
    assert seen == [(3, 20)] * 3 + [(1, 2)]


def edited(family, choose, tiny):
    """A view and a random edit of layers 1 and 3."""
    lm = tiny(family)
    view = view_decoder(lm.model)
    edit = NeuronDelta(view, choose(lm, "intermediate"))
    edit.restore({name: 0.3 * torch.randn_like(value) for name, value in edit.deltas().items()})
    return view, edit


def test_before_and_after_are_two_full_passes(family, choose, tiny, sequences):
    view, edit = edited(family, choose, tiny)
    rows = pack_sequences(sequences)
    before, after = before_and_after(view, rows, everywhere(rows), edit)
    assert (before - after).abs().max() > 0.01
    assert torch.equal(after, final_hidden(view, rows, everywhere(rows)))
    with edit.disabled():
        assert torch.equal(before, final_hidden(view, rows, everywhere(rows)))
    same = before_and_after(view, rows, everywhere(rows), None)
    assert same[0] is same[1]


def gradients(run, choose, tiny, sequences):
    torch.manual_seed(1)
    view, edit = edited("gemma3", choose, tiny)
    rows = pack([prefix_tree([sequences[0], [*sequences[0][:9], 4]]), prefix_tree(sequences[1:2])]).rows
    frame = open_frame(view, rows)
    final = finish(view, frame, run_layers(view, frame, frame.embedded, last=1), 1, torch.arange(5), run)
    final.square().sum().backward()
    return final.detach(), [p.grad for p in edit.trainable()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
@pytest.mark.parametrize("way", ["checkpointed", "compiled", "both"])
def test_ways_to_run_a_layer_agree(way, choose, tiny, sequences):
    if way != "checkpointed" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a processor")
    runner = {"checkpointed": lambda: checkpointed(plain), "compiled": compiled, "both": lambda: checkpointed(compiled())}[way]()
    hidden, grads = gradients(plain, choose, tiny, sequences)
    other, theirs = gradients(runner, choose, tiny, sequences)
    assert min(g.abs().max() for g in grads) > 1e-4
    torch.testing.assert_close(other, hidden, rtol=1e-5, atol=1e-5)
    for mine, their in zip(grads, theirs, strict=True):
        torch.testing.assert_close(their, mine, rtol=1e-3, atol=1e-4)


def test_mlp_outputs_end_the_pass_early(family, ids):
    model, calls = tiny_model(family), []
    view = view_decoder(model)
    watched = [*(part.mlp for part in view.layers), view.head]
    handles = [count_calls(module, calls) for module in watched]
    found = mlp_outputs(view, pack_sequences(ids.tolist()), [2, 0])
    assert sorted(found) == [0, 2]
    assert calls == [view.layers[i].mlp for i in (0, 1, 2)]
    assert not any(output.requires_grad for output in found.values())
    for handle in handles:
        handle.remove()


def test_the_head_never_runs_in_a_pass_of_the_backbone(ids):
    view, calls = view_decoder(tiny_model("gemma2")), []
    count_calls(view.head, calls)
    rows = pack_sequences(ids.tolist())
    final_hidden(view, rows, everywhere(rows))
    assert calls == []


RUNS = [lambda view, rows: mlp_outputs(view, rows, [0, 3]), lambda view, rows: final_hidden(view, rows, torch.arange(3)), open_frame]


@pytest.mark.parametrize("run", RUNS)
def test_the_model_is_left_as_it_was_also_behind_an_error(run, ids):
    model = tiny_model("gemma2")
    view, rows = view_decoder(model), pack_sequences(ids.tolist())
    run(view, rows)
    assert hook_count(model) == 0

    def fail(*_):
        raise ZeroDivisionError

    where = view.final_norm if run is open_frame else view.layers[2].mlp
    handle = where.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(view, rows)
    handle.remove()
    assert hook_count(model) == 0
