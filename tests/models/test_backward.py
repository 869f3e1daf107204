"""Gradients read by hooks, against autograd's own."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.batching import pack, pack_sequences, prefix_tree
from bad_neurons.models.backward import final_with_graph, linear_gradients
from bad_neurons.models.passes import final_hidden
from bad_neurons.models.view import view_decoder
from bad_neurons.testing import tiny_model


def random_sequences(*lengths):
    return [torch.randint(3, 259, (n,)).tolist() for n in lengths]


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("first", [0, 2])
def test_final_states_are_those_of_the_plain_pass(family, first):
    view = view_decoder(tiny_model(family).requires_grad_(False))
    one, other = random_sequences(12, 5)
    rows = pack([prefix_tree([one, one[:9] + other]), prefix_tree([other])], 30).rows
    at = torch.tensor([3, 11, 13])
    final = final_with_graph(view, rows, at, first)
    assert final.requires_grad
    torch.testing.assert_close(final, final_hidden(view, rows, at), rtol=1e-5, atol=1e-5)


def test_a_product_of_what_is_seen_is_the_gradient(family):
    model = tiny_model(family).requires_grad_(False)
    view = view_decoder(model)
    names = [(layer, matrix) for layer in (1, 2) for matrix in ("gate_proj", "up_proj", "down_proj", "q_proj", "o_proj")]
    linears = {(layer, matrix): view.layers[layer].matrix(matrix) for layer, matrix in names}
    rows, found = pack_sequences(random_sequences(10, 7)), {}
    at, pull = rows.followed(), torch.randn(len(rows.followed()), 16)

    def visit(key, x, g):
        assert x.shape[:2] == g.shape[:2] == rows.input_ids.shape
        found[key] = g.flatten(0, 1).T @ x.flatten(0, 1)

    with linear_gradients(linears, visit):
        (final_with_graph(view, rows, at, 1) * pull).sum().backward()
    assert hook_count(model) == 0
    assert all(p.grad is None for p in model.parameters())
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    final = model.get_decoder()(input_ids=rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state.flatten(0, 1)[at]
    (final * pull).sum().backward()
    for key, linear in linears.items():
        assert linear.weight.grad.abs().max() > 1e-3
        torch.testing.assert_close(found[key], linear.weight.grad, rtol=1e-3, atol=1e-4)


def test_what_the_pass_does_not_reach_is_not_visited_and_hooks_come_off_after_an_error():
    model = tiny_model("llama").requires_grad_(False)
    view, rows, seen = view_decoder(model), pack_sequences(random_sequences(6)), []
    linears = {layer: view.layers[layer].matrix("up_proj") for layer in range(4)}
    with linear_gradients(linears, lambda key, *_: seen.append(key)):
        final_with_graph(view, rows, rows.followed(), 2).sum().backward()
    assert seen == [3, 2]
    with pytest.raises(RuntimeError, match="on purpose"), linear_gradients(linears, lambda *_: None):
        raise RuntimeError("on purpose")
    assert hook_count(model) == 0
