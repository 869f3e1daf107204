"""The behaviour as a differentiable number of the clean model, and its gradient by every matrix of which a unit owns a part.

- ``odds``: the mean opinion shift itself: log-odds of the agreeing over the disagreeing position
  (:attr:`~bad_neurons.data.records.Record.scored`) under the person's prompt, minus under the neutral prompt where there is one.
- ``neutral``: what the target ``neutral`` of tuning minimises, at the clean model: KL from its distribution without the person
  to the one with the person, over the words of both positions.

Legend: N places that are asked, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bad_neurons.batching import shared_batches
from bad_neurons.data.records import Record
from bad_neurons.data.tuning import SycophancyDataModule, TuningBatch
from bad_neurons.errors import UserError
from bad_neurons.models.backward import final_with_graph, linear_gradients
from bad_neurons.models.passes import final_hidden
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import DecoderView
from bad_neurons.selection.ways.material import Material, Matrix
from bad_neurons.tuning.losses import Supervision, loss_sums


def behaviour_gradients(material: Material) -> dict[Matrix, Tensor]:
    """Gradient [out, in], float32, of the behaviour (a mean over records) by each matrix; its sign is that of the behaviour.

    Raises:
        UserError: no record has a neutral prompt, for the objective ``neutral``.
    """
    batches, count = behaviour_batches(material)
    found = {at: torch.zeros_like(linear.weight, dtype=torch.float32) for at, linear in material.linears.items()}

    def add(at: Matrix, x: Tensor, g: Tensor) -> None:
        found[at].addmm_(g.flatten(0, 1).T, x.flatten(0, 1))

    with linear_gradients(material.linears, add):
        for batch in tqdm(batches, desc=f"gradient of {material.objective}", unit="batch", leave=False):
            behaviour(material.view, batch, material.layers[0]).backward()  # type: ignore[no-untyped-call]
    return {at: gradient.div_(count) for at, gradient in found.items()}


def behaviour(view: DecoderView, batch: TuningBatch, first: int) -> Tensor:
    """The behaviour's sum over one batch, with the graph of layers ``first`` and above."""
    device = view.device
    tuned = final_with_graph(view, batch.rows.to(device), batch.at.to(device), first)
    teacher = final_hidden(view, batch.teacher.rows.to(device), batch.teacher.at.to(device)) if batch.teacher else None
    honest, neutral = batch.honest.to(device), batch.neutral.to(device) if batch.teacher else None
    asked = Supervision(tuned.detach(), batch.targets.to(device), honest, torch.zeros_like(honest), neutral, teacher)
    return loss_sums(view, tuned, asked, alpha=0.0, beta=0.0).loss


def behaviour_batches(material: Material) -> tuple[list[TuningBatch], float]:
    """What to run for the objective, and what its sum over all batches is divided by."""
    if material.objective == "odds":
        return odds_batches(material.lm.tokenizer, material.records, material.max_tokens), len(material.records)
    usable = [record for record in material.records if record.neutral_prompt]
    if not usable:
        raise UserError("--objective neutral: no record has a neutral prompt; give other records, or --objective odds")
    data = SycophancyDataModule(material.lm.id, target="neutral", batch_tokens=material.max_tokens, retention=None)
    batches = data.make_batches(material.lm.tokenizer, usable)
    return batches, sum(float(batch.answer.sum()) for batch in batches)


def odds_batches(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], max_tokens: int) -> list[TuningBatch]:
    """The objective ``odds`` as cross entropies: ``honest`` weighs each place's next token, below 0 where it is to count for it.

    What answers share cancels: a token on which both positions begin alike has the weight zero and is left out.
    """
    sequences, starts, signs = [], [], []
    for record in records:
        for prompt, sign in ((record.prompt, -1.0), (record.neutral_prompt, 1.0)):
            for answer, side in zip(record.scored, (sign, -sign), strict=True):
                if prompt:
                    ids = tokenize(tokenizer, prompt, answer)
                    sequences.append(ids.prompt + ids.answer)
                    starts.append(len(ids.prompt) - 1)
                    signs.append(side)
    batches = []
    for numbers, paths, rows in shared_batches([ids[:-1] for ids in sequences], max_tokens):
        weights: dict[tuple[int, int], float] = {}
        for number, path in zip(numbers, paths, strict=True):
            start = starts[number]
            for place, target in zip(path[start:], sequences[number][start + 1 :], strict=True):
                weights[place, target] = weights.get((place, target), 0.0) + signs[number]
        kept = {asked: weight for asked, weight in weights.items() if weight}
        if kept:
            at, targets = torch.tensor(list(kept)).T
            weight = torch.tensor(list(kept.values()))
            batches.append(TuningBatch(rows, at, targets, weight, torch.zeros_like(weight), torch.zeros_like(weight)))
    return batches
