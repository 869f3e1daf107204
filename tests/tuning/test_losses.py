"""The chunked loss against a closed form, a dense form, and float64 autograd written here."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import nn

from bad_neurons.models import head
from bad_neurons.models.view import DecoderView
from bad_neurons.tuning import losses
from bad_neurons.tuning.losses import Supervision, dense_loss_sums, loss_sums

D, V = 6, 11
SIZES = [1, 7, 8, 9, 25]  # around the chunk of 8 places


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Chunks of 8 places and, in a full one, blocks of 4 of the 11 entries of the vocabulary, so that there are several of each."""
    monkeypatch.setattr(losses, "ROWS", 8)
    monkeypatch.setattr(head, "_BLOCK", 32)


WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.7, 0.3)]
TARGETS = ["honest", "neutral", "mixed"]


def head_view(weight, softcap=None):
    """A view that has a head and a soft cap and nothing else."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return DecoderView(nn.Module(), nn.Module(), (), nn.Module(), head, softcap)


def problem(n, target, softcap, seed=0):
    """A random view, hidden states and supervision of n places: some answers, some to stay, some neither; some count several times.

    Of a mixed target, places have the honest answer, the teacher, both with weights of their own, or neither.
    """
    generator = torch.Generator().manual_seed(seed)
    view = head_view(1.5 * torch.randn(V, D, generator=generator), softcap)
    tuned, clean, asker = (torch.randn(n, D, generator=generator) for _ in range(3))
    answers = 1 + int(0.6 * (n - 1))  # those of answers come first
    counts = [torch.randint(1, 4, (n,), generator=generator).float() for _ in range(2)]
    answer = counts[0] * (torch.arange(n) < answers)
    stays = counts[1] * (torch.rand(n, generator=generator) < 0.7)
    targets = torch.randint(V, (n,), generator=generator)
    if target == "honest":
        return view, tuned, Supervision(clean, targets, answer, stays)
    honest = 0.3 * answer.roll(1) * (torch.rand(n, generator=generator) < 0.8) if target == "mixed" else 0 * answer
    return view, tuned, Supervision(clean, targets, honest, stays, (0.7 if target == "mixed" else 1.0) * answer, asker[:answers])


def reference(view, tuned, asked, alpha, beta):
    """Loss, its parts and its gradient by ``tuned``, in float64 and from the definitions, position by position."""
    tuned = tuned.double().requires_grad_()
    weight = view.head.weight.double()

    def probabilities(hidden):
        z = weight @ hidden
        e = (z if view.softcap is None else view.softcap * torch.tanh(z / view.softcap)).exp()
        return e / e.sum()

    ce, neutral_kl, kl, entropy = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for i in range(len(tuned)):
        p, p0 = probabilities(tuned[i]), probabilities(asked.clean[i].double())
        ce = ce - asked.honest[i] * p[asked.targets[i]].log()
        entropy = entropy - asked.honest[i] * (p * p.log()).sum()
        if asked.neutral is not None and asked.neutral[i]:
            q = probabilities(asked.teacher[i].double())
            neutral_kl = neutral_kl + asked.neutral[i] * (q * (q / p).log()).sum()
            entropy = entropy - asked.neutral[i] * (p * p.log()).sum()
        if asked.stays[i]:
            kl = kl + asked.stays[i] * (p0 * (p0 / p).log()).sum()
    loss = ce + neutral_kl + alpha * kl - beta * entropy
    return torch.stack([loss, ce, neutral_kl, kl, entropy]).detach(), torch.autograd.grad(loss, tuned)[0]


def value_and_gradient(function, view, tuned, asked, alpha, beta):
    tuned = tuned.clone().requires_grad_()
    sums = function(view, tuned, asked, alpha, beta)
    sums.loss.backward()
    return torch.stack([s.detach() for s in sums]), tuned.grad


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", SIZES)
def test_against_float64_and_against_dense(n, target, softcap, alpha, beta):
    given = (*problem(n, target, softcap), alpha, beta)
    sums, gradient = reference(*given)
    assert [bool(s) for s in sums[1:3]] == [target != "neutral" and bool(given[2].honest.any()), target != "honest"]
    assert gradient.abs().max() > 0.05
    for function in (loss_sums, dense_loss_sums):
        found, found_gradient = value_and_gradient(function, *given)
        torch.testing.assert_close(found.double(), sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_gradient.double(), gradient, rtol=1e-4, atol=1e-5)


# By hand, V = d = 2 and an identity head: tuned p = (1/4, 3/4), clean p0 = (1/2, 1/2), teacher q = (4/5, 1/5).
CE = log(4)
KL = log(4 / 3) / 2
ENTROPY = log(4) / 4 + 3 * log(4 / 3) / 4
TEACHER_KL = 0.8 * log(0.8 / 0.25) + 0.2 * log(0.2 / 0.75)
ALPHA, BETA = 0.5, 0.25


SHARES = {"honest": (1.0, 0.0), "neutral": (0.0, 1.0), "mixed": (0.25, 0.75)}


def by_hand(softcap, target):
    cap = (lambda z: z) if softcap is None else (lambda z: softcap * torch.atanh(z / softcap))
    tuned, clean, asker = (cap(torch.tensor([[z, 0.0]])) for z in (-log(3), 0.0, log(4)))
    honest, neutral = (torch.tensor([share]) for share in SHARES[target])
    return head_view(torch.eye(2), softcap), tuned, Supervision(clean, torch.tensor([0]), honest, torch.ones(1), neutral, asker)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("target", TARGETS)
def test_closed_form(softcap, target):
    found, gradient = value_and_gradient(loss_sums, *by_hand(softcap, target), ALPHA, BETA)
    honest, neutral = SHARES[target]
    expected = [honest * CE + neutral * TEACHER_KL + ALPHA * KL - BETA * ENTROPY, honest * CE, neutral * TEACHER_KL, KL, ENTROPY]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    # first logit: p - q, p - p0 and p (log p + H)
    by_first = 0.25 - (honest + 0.8 * neutral) + ALPHA * (0.25 - 0.5) + BETA * 0.25 * (log(0.25) + ENTROPY)
    slopes = [1.0 if softcap is None else 1 - (z / softcap) ** 2 for z in (-log(3), 0.0)]
    torch.testing.assert_close(gradient, torch.tensor([[by_first * slopes[0], -by_first * slopes[1]]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_kl_to_itself_is_exactly_zero(n):
    view, tuned, asked = problem(n, "honest", 2.0)
    assert loss_sums(view, tuned, asked, 1.0, 0.0).kl > 0 or not asked.stays.any()
    asked = asked._replace(clean=tuned, stays=torch.ones(n), honest=torch.zeros(n))
    found, gradient = value_and_gradient(loss_sums, view, tuned, asked, 3.0, 1.0)
    assert found.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0]
    assert not gradient.any()


def test_a_teacher_that_is_the_model_itself_asks_for_nothing():
    view, tuned, asked = problem(70, "neutral", None)
    everywhere = torch.ones(70)
    found, gradient = value_and_gradient(loss_sums, view, tuned, asked._replace(teacher=tuned, neutral=everywhere), 0.0, 0.0)
    assert (found[:3].tolist(), gradient.abs().max().item()) == ([0.0, 0.0, 0.0], 0.0)


def test_sums_add_up_over_positions():
    view, tuned, asked = problem(130, "honest", 2.0)
    whole, whole_gradient = value_and_gradient(loss_sums, view, tuned, asked, 0.7, 0.3)
    parts = [
        value_and_gradient(loss_sums, view, tuned[rows], Supervision(*(t[rows] for t in asked[:4])), 0.7, 0.3)
        for rows in (slice(0, 1), slice(1, 100), slice(100, 130))
    ]
    torch.testing.assert_close(sum(sums for sums, _ in parts), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), whole_gradient, rtol=1e-6, atol=1e-6)


def test_targets_are_read_at_honest_answers_alone():
    view, tuned, asked = problem(90, "mixed", None)
    other = asked._replace(targets=torch.where(asked.honest > 0, asked.targets, (asked.targets + 1) % V))
    assert not torch.equal(other.targets, asked.targets)
    first, second = (value_and_gradient(loss_sums, view, tuned, a, 0.7, 0.3) for a in (asked, other))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=1e-6)


def test_logits_of_any_size_stay_finite():
    view = head_view(torch.eye(3))
    tuned = torch.tensor([[300.0, 0.0, -300.0], [0.0, 300.0, 0.0]])
    yes = torch.ones(2)
    found, gradient = value_and_gradient(loss_sums, view, tuned, Supervision(torch.zeros(2, 3), torch.tensor([0, 0]), yes, yes), 1.0, 0.5)
    # CE 0 and 300; KL: mean over (1/3) of the logits' distance from the largest, minus log 3; no entropy
    torch.testing.assert_close(found, torch.tensor([300 + 500 - 2 * log(3), 300.0, 0.0, 500 - 2 * log(3), 0.0]), rtol=1e-5, atol=1e-4)
    assert gradient.isfinite().all()


def test_no_gradient_is_made_where_none_is_wanted():
    view, tuned, asked = problem(5, "honest", None)
    assert not loss_sums(view, tuned, asked, 1.0, 0.0).loss.requires_grad
