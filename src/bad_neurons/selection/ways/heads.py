"""By attention head: how much of the pull towards the person goes through each head where the answer is decided.

Supervised Pinpoint Tuning (arXiv 2409.01658) picks heads by path patching: one head's output is replaced by what it is under
a counterfactual prompt, and the head matters as much as the logits of the answer then change; that is a pass of the model for
each head. Here the counterfactual is the prompt without the person, and all heads are had at once by the first-order stand-in
for such a replacement, attribution patching (arXiv 2310.10348; 2403.00745, which finds it the best of the cheap ones): with z_h
what head h hands to ``o_proj`` and m the log-odds of the agreeing over the disagreeing position under the person's prompt,

    effect_h = mean over records of the sum over places of (z_h(person) - z_h(neutral)) . dm/dz_h

and the score is its size. Places are those that predict the positions' words, which the two prompts have in common; what a
head does inside the prompt has no counterpart and does not count. Path patching holds the other heads still, so that a head's
way to the logits leads through the MLPs alone; the gradient here takes the later heads along.

Legend: B rows, T columns, H query heads of size D, N places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bad_neurons.batching import Packed, Tree, batches_by_length, pack, prefix_tree
from bad_neurons.data.records import Record
from bad_neurons.errors import UserError
from bad_neurons.models.passes import finish, open_frame, run_layers
from bad_neurons.models.prompts import Turn, tokenize
from bad_neurons.models.view import DecoderView
from bad_neurons.selection.axes import units
from bad_neurons.selection.ways.material import Material
from bad_neurons.tuning.losses import Supervision, loss_sums


def head_scores(material: Material) -> dict[int, Tensor]:
    """The size of each head's effect, see :func:`head_effects`."""
    if material.axis != "heads":
        raise UserError(f"--axis {material.axis}: the way heads scores attention heads; give --axis heads")
    effects = head_effects(material.view, material.lm.tokenizer, material.records, material.layers, material.max_tokens)
    return {layer: effect.abs() for layer, effect in effects.items()}


def head_effects(
    view: DecoderView, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], layers: Sequence[int], max_tokens: int = 2048
) -> dict[int, Tensor]:
    """Effect [H], in nats of the agreeing position's log-odds, of every head of each layer; above 0 where it pulls to the person.

    Args:
        view: the clean model.
        tokenizer: its tokenizer.
        records: training records; those without a neutral prompt are left out.
        layers: candidate layers.
        max_tokens: tokens of one batch after padding.

    Raises:
        UserError: no record has a neutral prompt.
    """
    wanted = sorted(layers)
    view.check_layers(wanted, "--layers")
    pairs = [
        (_side(tokenizer, record.prompt, record), _side(tokenizer, record.neutral_prompt, record))
        for record in records
        if record.neutral_prompt
    ]
    if not pairs:
        raise UserError("way heads: no record has a neutral prompt to compare the person's with; give other records")
    sums = {layer: torch.zeros(units(view, "heads"), device=view.device) for layer in wanted}
    lengths = [max(len(side.tree.ids) for side in pair) for pair in pairs]
    for batch in tqdm(batches_by_length(lengths, max_tokens), desc="heads", unit="batch", leave=False):
        person, neutral = (_Batch([pairs[i][side] for i in batch]) for side in (0, 1))
        for layer, effects in _effects(view, person, neutral, wanted).items():
            sums[layer] += effects
    return {layer: (total / len(pairs)).cpu() for layer, total in sums.items()}


class _Side(NamedTuple):
    """Both positions behind one prompt.

    Attributes:
        tree: the prompt with both, without their last tokens.
        places: of each position, the nodes that predict its tokens.
        targets: of each position, its tokens.
    """

    tree: Tree
    places: list[list[int]]
    targets: list[list[int]]


def _side(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Turn], record: Record) -> _Side:
    ids = [tokenize(tokenizer, prompt, answer) for answer in record.scored]
    tree = prefix_tree([t.prompt + t.answer[:-1] for t in ids])
    return _Side(tree, [path[len(t.prompt) - 1 :] for path, t in zip(tree.paths, ids, strict=True)], [t.answer for t in ids])


class _Batch:
    """Sides in rows.

    Attributes:
        packed: the rows.
        at: [N] flat places that predict a token of a position.
        targets: [N] the tokens.
        weight: [N] -1 for the agreeing position and 1 for the other, so that the weighted cross entropy is the log-odds m.
    """

    def __init__(self, sides: Sequence[_Side]) -> None:
        self.packed: Packed = pack([side.tree for side in sides])
        asked = [
            (start + node, target, sign)
            for side, start in zip(sides, self.packed.starts, strict=True)
            for places, targets, sign in zip(side.places, side.targets, (-1, 1), strict=True)
            for node, target in zip(places, targets, strict=True)
        ]
        self.at, self.targets, self.weight = torch.tensor(asked).T


def _effects(view: DecoderView, person: _Batch, neutral: _Batch, layers: Sequence[int]) -> dict[int, Tensor]:
    """Sum over a batch of the effects [H] by layer."""
    device = view.device
    with torch.no_grad(), _head_outputs(view, layers) as apart:
        frame = open_frame(view, neutral.packed.rows.to(device))
        run_layers(view, frame, frame.embedded, last=max(layers) + 1)
    with _head_outputs(view, layers) as with_person:
        frame = open_frame(view, person.packed.rows.to(device))
        with torch.no_grad():
            hidden = run_layers(view, frame, frame.embedded, last=min(layers))
        final = finish(view, frame, hidden.requires_grad_(True), min(layers), person.at.to(device))
    weight = person.weight.to(device, torch.float32)
    asked = Supervision(final.detach(), person.targets.to(device), weight, torch.zeros_like(weight))
    odds = loss_sums(view, final, asked, alpha=0.0, beta=0.0).loss
    gradients = torch.autograd.grad(odds, [with_person[layer] for layer in layers])
    here, there = torch.stack([person.at, neutral.at], 1).unique(dim=0).T.to(device)  # positions that begin alike share places
    effects = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        z, z0, g = (t.flatten(0, 1)[at].float() for t, at in ((with_person[layer], here), (apart[layer], there), (gradient, here)))
        effects[layer] = ((z - z0) * g).detach().view(len(here), -1, view.head_dim).sum((0, 2))
    return effects


@contextmanager
def _head_outputs(view: DecoderView, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What all heads of each layer hand to ``o_proj``, [B, T, H * D], of the pass that runs inside the block."""
    outputs: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            outputs[layer] = args[0]

        return keep

    handles = [view.layers[layer].matrix("o_proj").register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
