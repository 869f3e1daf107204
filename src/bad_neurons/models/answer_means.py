"""Mean activations over the words of answers, read at any module of some layers.

Legend: B rows, T columns, A answers, n numbers that a module takes or gives at a position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bad_neurons.batching import shared_batches
from bad_neurons.models.passes import visit_points
from bad_neurons.models.prompts import Tokenized
from bad_neurons.models.view import DecoderView
from bad_neurons.numbers import check_finite


def answer_means(
    view: DecoderView, ids: Sequence[Tokenized], points: Mapping[int, nn.Module], *, inputs: bool, max_tokens: int, what: str
) -> dict[int, Tensor]:
    """Mean [A, n], float32 on the CPU, over each answer's tokens, by layer.

    Args:
        view: the model.
        ids: prompts with their answers; what they share at the beginning is read once.
        points: by layer, the module at which to read.
        inputs: what the module takes; else what it gives.
        max_tokens: tokens of one batch after padding.
        what: text of the progress bar.
    """
    found: dict[int, Tensor] = {}

    def visit(layer: int, taken: Tensor, given: Tensor) -> None:
        values = (taken if inputs else given).flatten(0, 1).float()
        means = torch.stack([values[places].mean(0) for places in asked]).cpu()
        check_finite(means, f"{what}: activations of layer {layer}")
        found.setdefault(layer, torch.empty(len(ids), means.shape[1]))[batch.numbers] = means

    for batch in tqdm(shared_batches([t.prompt + t.answer for t in ids], max_tokens), desc=what, unit="batch", leave=False):
        asked = [path[len(ids[number].prompt) :] for number, path in zip(batch.numbers, batch.paths, strict=True)]
        visit_points(view, batch.rows.to(view.device), points, visit)
    return found
