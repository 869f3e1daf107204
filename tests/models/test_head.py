"""Blocked logits against dense ones in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bad_neurons.models import head
from bad_neurons.models.head import Logits
from bad_neurons.models.view import DecoderView

V, D, R = 23, 6, 5


@pytest.fixture(params=[None, 2.0], ids=["bare", "capped"])
def view(request):
    """A view that has a head and a soft cap and nothing else."""
    linear = nn.Linear(D, V, bias=False)
    linear.weight = nn.Parameter(1.5 * torch.randn(V, D), requires_grad=False)
    return DecoderView(nn.Module(), nn.Module(), (), nn.Module(), linear, request.param)


@pytest.fixture(params=[1, 4, 23, 100])
def block(request, monkeypatch):
    """Blocks of one entry, of some with a shorter last one, of all."""
    monkeypatch.setattr(head, "_BLOCK", request.param * R)
    return request.param


def dense(view, hidden):
    z = hidden.double() @ view.head.weight.double().T
    return z if view.softcap is None else view.softcap * torch.tanh(z / view.softcap)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_are_the_logits(view, block, threads):
    hidden, before = torch.randn(R, D), torch.get_num_threads()
    logits = Logits(view, hidden)
    torch.set_num_threads(threads)
    try:
        found = logits.each_block(lambda columns: (columns.start, logits.block(columns), torch.get_num_threads()))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    starts, blocks, inside = zip(*found, strict=True)
    assert list(starts) == list(range(0, V, block))
    assert set(inside) == {1}
    torch.testing.assert_close(torch.cat(blocks, 1).double(), dense(view, hidden), rtol=1e-5, atol=1e-5)


def test_normaliser_mean_and_entries(view, block):
    hidden = torch.randn(R, D)
    logits, z = Logits(view, hidden), dense(view, hidden)
    torch.testing.assert_close(logits.log_norm.double(), z.logsumexp(-1, keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.mean.double(), (z.softmax(-1) * z).sum(-1, keepdim=True), rtol=1e-5, atol=1e-5)
    rows, ids = torch.tensor([0, 0, 4]), torch.tensor([3, 22, 1])
    torch.testing.assert_close(logits.at(rows, ids).double(), z[rows, ids], rtol=1e-5, atol=1e-5)


def test_kl_of_all_and_of_some(view, block):
    one, other = torch.randn(R, D), torch.randn(R, D)
    p, q = (dense(view, h).log_softmax(-1) for h in (one, other))
    expected = (p.exp() * (p - q)).sum(-1)
    assert expected.min() > 0.05
    torch.testing.assert_close(Logits(view, one).kl_to(Logits(view, other)).double(), expected, rtol=1e-4, atol=1e-5)
    some = slice(1, 4)
    torch.testing.assert_close(Logits(view, one[some]).kl_to(Logits(view, other).rows(some)).double(), expected[some], rtol=1e-4, atol=1e-5)
    assert Logits(view, one).kl_to(Logits(view, one)).tolist() == [0.0] * R


def test_kl_to_itself_is_zero_over_many_blocks(monkeypatch):
    monkeypatch.setattr(head, "_BLOCK", 16 * 40)
    linear = nn.Linear(D, 5000, bias=False).requires_grad_(False)
    view, hidden = DecoderView(nn.Module(), nn.Module(), (), nn.Module(), linear, None), torch.randn(40, D)
    assert Logits(view, hidden).kl_to(Logits(view, hidden)).tolist() == [0.0] * 40
    assert Logits(view, hidden[3:20]).kl_to(Logits(view, hidden).rows(slice(3, 20))).tolist() == [0.0] * 17


def test_bfloat16_logits_are_rounded_once():
    linear = nn.Linear(D, V, bias=False).bfloat16().requires_grad_(False)
    view = DecoderView(nn.Module(), nn.Module(), (), nn.Module(), linear, None)
    hidden = torch.randn(R, D).bfloat16()
    logits = Logits(view, hidden)
    assert logits.raw.dtype == torch.bfloat16
    torch.testing.assert_close(logits.log_norm, linear(hidden).float().logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-6)


def test_entries_are_drawn_where_the_summed_probability_passes(view, block):
    hidden, u = torch.randn(R, D), torch.rand(R)
    held = dense(view, hidden).softmax(-1).cumsum(-1)
    expected = torch.searchsorted(held, u[:, None].double(), right=True).squeeze(1)
    assert len(expected.unique()) > 2
    assert torch.equal(Logits(view, hidden).drawn(u), expected)
    ends = torch.tensor([0.0, 0.0, 1 - 2**-24, 0.5, 1 - 2**-24])  # the least and the most that torch.rand gives
    drawn = Logits(view, hidden).drawn(ends)
    assert drawn[:2].tolist() == [0, 0]
    assert int(drawn.max()) < V


def test_entries_are_drawn_as_often_as_they_are_likely(view):
    hidden = torch.randn(1, D).repeat(4000, 1)
    drawn = torch.cat([Logits(view, h).drawn(torch.rand(len(h))) for h in hidden.split(500)])
    share, p = drawn.bincount(minlength=V) / len(drawn), dense(view, hidden[:1]).softmax(-1)[0]
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / len(drawn)).sqrt() + 1e-3).all()
