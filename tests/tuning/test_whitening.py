"""AdamW in whitened coordinates, against torch's own AdamW on those coordinates."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.whitening import Reads, WhitenedAdamW, input_moments, whitener


def spread(n: int, seed: int = 0) -> torch.Tensor:
    """A second moment [n, n] with very different variances."""
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 1, n)
    return x.T @ x / len(x)


def test_whitener_is_the_inverse_root():
    A = spread(6)
    R = whitener(A, 0.05).double()
    torch.testing.assert_close(R, R.T)
    torch.testing.assert_close(R @ (A.double() / A.diagonal().mean() + 0.05 * torch.eye(6)) @ R, torch.eye(6).double(), atol=1e-4, rtol=0)


def test_whitener_of_a_diagonal_is_that_of_the_matrix():
    diagonal = torch.tensor([1.0, 4.0, 9.0])
    torch.testing.assert_close(whitener(diagonal, 0.1), whitener(diagonal.diag(), 0.1).diagonal())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_adamw_on_theta(weight_decay):
    """D = theta R throughout, theta by torch's AdamW; one parameter has no R."""
    generator = torch.Generator().manual_seed(1)
    target, R = torch.randn(3, 6, generator=generator), whitener(spread(6), 0.05)
    D, plain = (torch.nn.Parameter(torch.zeros(3, 6)) for _ in range(2))
    theta, other = (torch.nn.Parameter(torch.zeros(3, 6)) for _ in range(2))
    mine = WhitenedAdamW([D, plain], {D: R}, lr=0.02, weight_decay=weight_decay)
    theirs = torch.optim.AdamW([theta, other], lr=0.02, weight_decay=weight_decay)
    for _ in range(20):
        for optimizer, change, beside in ((mine, D, plain), (theirs, theta @ R, other)):
            optimizer.zero_grad()
            ((change - target).square().sum() + (beside - target).pow(4).sum()).backward()
        mine.step()
        theirs.step()
    assert D.abs().max() > 0.05
    torch.testing.assert_close(D, theta @ R, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain, other)


def test_steps_cost_the_text_the_same_in_every_direction():
    """One step from a gradient that is as large in a loud direction as in a quiet one: tr(D A D^T) is about equal."""
    A = torch.diag(torch.tensor([100.0, 1.0]))
    D = torch.nn.Parameter(torch.zeros(1, 2))
    optimizer = WhitenedAdamW([D], {D: whitener(A, 1e-4)}, lr=0.1)
    D.grad = torch.ones(1, 2)
    optimizer.step()
    costs = D.detach().square() * A.diagonal()
    assert D[0, 1].abs() > 9 * D[0, 0].abs() > 0
    torch.testing.assert_close(costs[0, 0], costs[0, 1], rtol=0.02, atol=0)


@pytest.mark.parametrize("columns", [None, [3, 0, 7]])
def test_moments_are_those_of_single_passes(tiny, family, columns):
    """Against hooks on transformers' own forward, one sequence at a time, BOS left out."""
    lm = tiny(family)
    view = view_decoder(lm.model)
    sequences = [[2, *torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist()] for n in (5, 11, 9)]
    chosen = None if columns is None else torch.tensor(columns)
    wanted = {
        torch.nn.Parameter(torch.zeros(1)): Reads(layer, view.layers[layer].matrix(name), chosen)
        for layer, name in ((1, "gate_proj"), (3, "down_proj"))
    }
    found = input_moments(view, wanted, sequences, max_tokens=16)
    for parameter, read in wanted.items():
        inputs: list[torch.Tensor] = []
        handle = read.linear.register_forward_pre_hook(lambda _m, args, inputs=inputs: inputs.append(args[0][0, 1:]))
        for ids in sequences:
            lm.model(input_ids=torch.tensor([ids]))
        handle.remove()
        x = torch.cat(inputs).double()
        x = x if columns is None else x[:, columns]
        torch.testing.assert_close(found[parameter].double(), x.T @ x / len(x), atol=1e-5, rtol=1e-4)
        assert not read.linear._forward_pre_hooks


def test_above_a_width_the_diagonal_alone(tiny, monkeypatch):
    monkeypatch.setattr("bad_neurons.tuning.whitening.MAX_INPUTS", 20)
    view = view_decoder(tiny().model)
    narrow, wide = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    reads = {narrow: Reads(0, view.layers[0].matrix("gate_proj"), None), wide: Reads(0, view.layers[0].matrix("down_proj"), None)}
    found = input_moments(view, reads, [[2, 5, 6, 7, 8]])
    assert (found[narrow].shape, found[wide].shape) == ((16, 16), (24,))
