"""Steering: a constant vector added to the residual stream while the model runs. Nothing is trained.

The vector is that of contrastive activation addition (arXiv 2312.06681, section 3): the mean difference of residual activations
between two completions of the same prompt. There they are read at the letter, (A) or (B), of the answer; a letter is not an
opinion, so here they are the words of the two positions, and each is read as the mean over its tokens. There the vector is added at
every token behind the prompt; here at every token, since nothing in a text tells where a prompt ends, and what that does to
unrelated text is measured as for every other correction.

Legend: B rows, T columns, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bad_neurons.artifacts import digest_json
from bad_neurons.batching import batches_by_length, pack, prefix_tree
from bad_neurons.data.records import Record
from bad_neurons.errors import UserError
from bad_neurons.models.passes import open_frame, run_layers
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import DecoderView
from bad_neurons.tuning.dial import Dial
from bad_neurons.tuning.edits import check_same
from bad_neurons.tuning.whitening import Reads


class Steering(nn.Module):
    """Adds ``v_l`` behind each layer ``l``; :meth:`scaled` is the coefficient.

    Args:
        view: the model.
        vectors: v_l [d] by layer. Vectors of several layers add up on their way, so their common coefficient is to be smaller.
    """

    def __init__(self, view: DecoderView, vectors: Mapping[int, Tensor]) -> None:
        super().__init__()
        view.check_layers(sorted(vectors), "layers of steering")
        self._dial, self.first_layer, self._layers = Dial(), min(vectors), sorted(vectors)
        self._handles = []
        for layer in self._layers:
            self.register_buffer(f"v{layer}", vectors[layer].detach().to(view.device, torch.float32).clone())
            self._handles.append(view.layers[layer].layer.register_forward_hook(self._hook(f"v{layer}")))
        self.digest = digest_json(["steering", self._layers])

    def _hook(self, name: str) -> Any:
        def add(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            factor = self._dial.factor
            return output + (factor * self.get_buffer(name)).to(output.dtype) if factor else None

        return add

    def trainable(self) -> list[nn.Parameter]:
        """Nothing."""
        return []

    def reads(self) -> Mapping[nn.Parameter, Reads]:
        """Nothing."""
        return {}

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """The vectors count ``factor`` times inside the block."""
        return self._dial.scaled(factor)

    def disabled(self) -> AbstractContextManager[None]:
        """The clean model inside the block."""
        return self.scaled(0.0)

    def after_step(self) -> None:
        """Nothing: there is no step."""

    def deltas(self) -> dict[str, Tensor]:
        """The vectors by name (``layers.9.residual``)."""
        return {f"layers.{layer}.residual": self.get_buffer(f"v{layer}").clone() for layer in self._layers}

    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the vectors.

        Raises:
            UserError: other layers or another size.
        """
        check_same(self.deltas(), deltas)
        for layer in self._layers:
            self.get_buffer(f"v{layer}").copy_(deltas[f"layers.{layer}.residual"])

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def steering_vectors(
    view: DecoderView, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], layers: Sequence[int], max_tokens: int = 2048
) -> dict[int, Tensor]:
    """v_l [d], float32, of each layer: mean over records of disagreeing minus agreeing, behind the layer, so that adding it corrects.

    Records whose person is right are left out: there agreeing is honest.

    Args:
        view: the clean model.
        tokenizer: its tokenizer.
        records: training records.
        layers: layers behind which to read.
        max_tokens: tokens of one batch after padding.

    Raises:
        UserError: no record has a person who may be contradicted.
    """
    wanted, kept = sorted(layers), [record for record in records if not record.person_is_right]
    view.check_layers(wanted, "layers of steering")
    if not kept:
        raise UserError("steering: the person is right in every record; expected some who are wrong, or opinions")
    ids = [[tokenize(tokenizer, record.prompt, answer) for answer in record.scored] for record in kept]
    trees = [prefix_tree([t.prompt + t.answer for t in pair]) for pair in ids]
    sums = {layer: torch.zeros(view.d_model, device=view.device) for layer in wanted}
    for batch in batches_by_length([len(tree.ids) for tree in trees], max_tokens):
        packed = pack([trees[i] for i in batch])
        places = [
            [start + node for node in path[len(t.prompt) :]]
            for i, start in zip(batch, packed.starts, strict=True)
            for path, t in zip(trees[i].paths, ids[i], strict=True)
        ]  # agreeing, disagreeing, agreeing, ...
        with torch.no_grad():
            frame, done = open_frame(view, packed.rows.to(view.device)), 0
            hidden = frame.embedded
            for layer in wanted:
                hidden, done = run_layers(view, frame, hidden, done, layer + 1), layer + 1
                means = torch.stack([hidden.flatten(0, 1)[at].float().mean(0) for at in places])
                sums[layer] += (means[1::2] - means[0::2]).sum(0)
    return {layer: total / len(kept) for layer, total in sums.items()}
