"""Effect for side effect by rows and columns, against loops over tokens and inverses in float64."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.models.prompts import tokenize_text
from bad_neurons.selection.ways import kfac, scores_of
from bad_neurons.selection.ways.behaviour import behaviour_gradients
from bad_neurons.selection.ways.fisher import TEXT_TOKENS
from ways_by_hand import LAYERS, TEXTS, UNITS, drawn_log_prob, drawn_texts, owned, untouched


def moments_by_hand(given):
    """Of each linear map A [in, in] and S [out, out], float64, token by token of one text at a time."""
    sums = dict.fromkeys(given.linears, (0.0, 0.0, 0))
    for ids, drawn in drawn_texts(given.lm):
        seen, handles = {}, []
        for at, linear in given.linears.items():

            def hook(_module, args, output, at=at, seen=seen):
                output.requires_grad_(True).retain_grad()
                seen[at] = args[0][0].detach(), output

            handles.append(linear.register_forward_hook(hook))
        drawn_log_prob(given.lm, ids, drawn).backward()
        for handle in handles:
            handle.remove()
        for at, (x, output) in seen.items():
            for t in range(1, len(ids) - 1):
                A, S, count = sums[at]
                xt, gt = x[t].double(), output.grad[0, t].double()
                sums[at] = A + torch.outer(xt, xt), S + torch.outer(gt, gt), count + 1
    return {at: (A / count, S / count) for at, (A, S, count) in sums.items()}


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen3"])
@pytest.mark.parametrize("axis", UNITS)
def test_scores_are_those_of_inverses(material, family, axis):
    given = material(family, axis=axis, damping=0.3)
    found = scores_of(given, "kfac")
    assert untouched(given.lm)
    G, worth = behaviour_gradients(given), {}
    for at, (A, S) in moments_by_hand(given).items():
        A, S = (M + 0.3 * M.diagonal().mean() * torch.eye(len(M)) for M in (A, S))
        g = G[at].double()
        worth[at] = g * (g @ A.inverse()) / S.diagonal()[:, None] if given.parts[at].rows else g * (S.inverse() @ g) / A.diagonal()
    for layer in LAYERS:
        expected = torch.stack([owned(worth, axis, layer, unit).sum() for unit in range(given.units)])
        torch.testing.assert_close(found[layer].double(), expected, rtol=2e-3, atol=1e-9)


def test_padding_changes_nothing(material):
    """Texts of different lengths side by side, or one at a time."""
    longest = max(len(tokenize_text(material().lm.tokenizer, text)[:TEXT_TOKENS]) for text in TEXTS)
    together, alone = (scores_of(material(max_tokens=tokens), "kfac") for tokens in (2048, longest))
    for layer in LAYERS:
        torch.testing.assert_close(together[layer], alone[layer], rtol=1e-3, atol=0)


def test_large_maps_are_taken_by_their_diagonals(material, monkeypatch):
    monkeypatch.setattr(kfac, "MAX_INPUTS", 1)
    given = material()
    found, G, worth = scores_of(given, "kfac"), behaviour_gradients(given), {}
    for at, moments in moments_by_hand(given).items():
        a, s = (M.diagonal() + given.damping * M.diagonal().mean() for M in moments)
        worth[at] = G[at].double() ** 2 / a / s[:, None]
    for layer in LAYERS:
        expected = torch.stack([owned(worth, given.axis, layer, unit).sum() for unit in range(given.units)])
        torch.testing.assert_close(found[layer].double(), expected, rtol=2e-3, atol=1e-9)
