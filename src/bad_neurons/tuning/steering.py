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
from bad_neurons.data.records import Record
from bad_neurons.errors import UserError
from bad_neurons.models.answer_means import answer_means
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
    """v_l [d], float32 on the CPU, of each layer: mean over records of disagreeing minus agreeing, so that adding it corrects.

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
    ids = [tokenize(tokenizer, record.prompt, answer) for record in kept for answer in record.scored]
    behind = {layer: view.layers[layer].layer for layer in wanted}
    means = answer_means(view, ids, behind, inputs=False, max_tokens=max_tokens, what="steering")
    return {layer: (of[1::2] - of[0::2]).mean(0) for layer, of in means.items()}
