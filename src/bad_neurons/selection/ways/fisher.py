"""By effect against side effect: how much of the behaviour a unit's weights move for the KL on unrelated text that they cost.

Near the clean model a small change D of the weights moves the behaviour by ``G . D``, G its gradient, and costs a KL of
``D . F D / 2`` nats per token, F the Fisher information (the KL's Hessian there: the mean over tokens of s s^T, s the gradient of
the log-probability of a token drawn from the model itself). With KL at most k, the largest effect is ``sqrt(2 k G . F^-1 G)``.
So ``G . F^-1 G`` is what a set of weights is worth, and its parts are scores. F is far too large as it is; two ways to cut it:

- ``fisher``: F by its diagonal, so a weight is worth ``G_w^2 / F_w`` and a unit the sum over what it owns.
- ``fisher_step``: a unit moves along its own gradient, as training it would begin, and has the curvature of that direction alone:
  ``|G_u|^2 / q_u``, q_u = ``G_u . F G_u / |G_u|^2``. Nothing within the unit is neglected: neither what its weights do together
  nor what several positions do.

``damping`` times the mean of all F_w or q_u is added to each, so that what the text happens not to touch does not count as free.

The diagonal from one matrix product. Let a linear map take x_t at position t, and g_t be the gradient of a text's summed
log-probabilities by what it gives there. The weight W_ij has the gradient ``g_ti x_tj`` through position t, whose square is
``g_ti^2 x_tj^2``; summed over positions that is ``(g^2)^T (x^2)``. Tokens of a text are drawn independently of each other given
what precedes them, so their scores are uncorrelated and one backward pass for all of them gives the expectation of the sum of
their squares. Positions are taken for uncorrelated as well, as is usual for shared weights; ``fisher_step`` need not do that.

Legend: B texts of a batch, T columns, N tokens that are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bad_neurons.batching import batches_by_length, pack_sequences
from bad_neurons.models.backward import final_with_graph, linear_gradients
from bad_neurons.models.head import ROWS, Logits
from bad_neurons.models.prompts import tokenize_text
from bad_neurons.models.view import DecoderView
from bad_neurons.selection.ways.behaviour import behaviour_gradients
from bad_neurons.selection.ways.material import Material, Matrix
from bad_neurons.tuning.losses import Supervision, loss_sums

TEXT_TOKENS = 64  # tokens of a text that are read


def fisher_scores(material: Material) -> dict[int, Tensor]:
    """``sum over owned weights of G^2 / (F + damping * mean F)``, F the diagonal."""
    gradients, curvature = behaviour_gradients(material), fisher_diagonal(material)
    floor = material.damping * float(sum(F.sum() for F in curvature.values()) / sum(F.numel() for F in curvature.values()))
    worth = {at: gradients[at].square() / (F + floor) for at, F in curvature.items()}
    return {layer: score.cpu() for layer, score in material.by_unit(worth).items()}


def fisher_step_scores(material: Material) -> dict[int, Tensor]:
    """``|G_u|^2 / (q_u + damping * mean q)``, q_u the curvature along the unit's own gradient."""
    gradients = behaviour_gradients(material)
    squares = material.by_unit({at: gradient.square() for at, gradient in gradients.items()})
    along = curvature_along(material, gradients)
    q = {layer: torch.where(square > 0, along[layer] / square, 0.0) for layer, square in squares.items()}
    floor = material.damping * torch.cat(list(q.values())).mean()
    return {layer: (square / (q[layer] + floor)).cpu() for layer, square in squares.items()}


def fisher_diagonal(material: Material) -> dict[Matrix, Tensor]:
    """Diagonal of the Fisher information per token, [out, in] a matrix, float32."""
    found = {at: torch.zeros_like(linear.weight, dtype=torch.float32) for at, linear in material.linears.items()}

    def add(at: Matrix, x: Tensor, g: Tensor) -> None:
        found[at].addmm_(g.flatten(0, 1).square().T, x.flatten(0, 1).square())

    tokens = sum(each_text_batch(material, add))
    return {at: F / tokens for at, F in found.items()}


def curvature_along(material: Material, directions: dict[Matrix, Tensor]) -> dict[int, Tensor]:
    """``D_u . F D_u`` per token of each unit u, [units] a layer, D_u what it owns of the directions [out, in].

    A text's score along D_u is ``sum over t, i, j of g_ti x_tj D_ij``: for owned rows i a sum over t of ``g_ti (D x_t)_i``, for
    owned columns j one of ``x_tj (D^T g_t)_j``. It is squared text by text.
    """
    texts: dict[int, Tensor] = {}  # [B, units] of the batch that is read

    def add(at: Matrix, x: Tensor, g: Tensor) -> None:
        D = directions[at]
        along = (g * (x @ D.T) if material.parts[at].rows else x * (g @ D)).sum(1).view(len(x), material.units, -1).sum(2)
        texts[at[0]] = texts[at[0]] + along if at[0] in texts else along

    tokens, found = 0, dict.fromkeys(material.layers, torch.zeros(material.units, device=material.view.device))
    for count in each_text_batch(material, add):
        found = {layer: total + texts.pop(layer).square().sum(0) for layer, total in found.items()}
        tokens += count
    return {layer: total / tokens for layer, total in found.items()}


def each_text_batch(material: Material, visit: Callable[[Matrix, Tensor, Tensor], None]) -> Iterator[int]:
    """Backward passes from drawn tokens over batches of texts, one text a row; gives the number of drawn tokens of each.

    Tokens are drawn from the model with the material's seed.
    """
    view, generator = material.view, torch.Generator().manual_seed(material.seed)
    sequences = [ids for text in material.texts if len(ids := tokenize_text(material.lm.tokenizer, text)[:TEXT_TOKENS]) > 1]
    batches = batches_by_length([len(ids) for ids in sequences], material.max_tokens)
    with linear_gradients(material.linears, visit):
        for batch in tqdm(batches, desc="curvature on unrelated text", unit="batch", leave=False):
            rows = pack_sequences([sequences[i] for i in batch]).to(view.device)
            final = final_with_graph(view, rows, at := rows.followed(), material.layers[0])
            targets = draw_tokens(view, final.detach(), generator)
            one = torch.ones(len(at), device=view.device)
            loss_sums(view, final, Supervision(final.detach(), targets, one, torch.zeros_like(one)), alpha=0.0, beta=0.0).loss.backward()
            yield len(at)


def draw_tokens(view: DecoderView, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """A token [N] from the model's distribution behind each final hidden state [N, d]."""
    u = torch.rand(len(hidden), generator=generator).to(hidden.device)
    return torch.cat([Logits(view, h).drawn(part) for h, part in zip(hidden.split(ROWS), u.split(ROWS), strict=True)])
