"""Full fine-tuning, as a correction to compare with: every weight of the decoder layers may learn.

Embeddings and head stay as they are, and so does the norm in front of the head: the losses read the clean and the tuned
hidden states through one frozen head (:mod:`bad_neurons.models.head`), and kept clean passes rest on the embeddings.

Legend: a linear map is stored [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bad_neurons.artifacts import digest_json
from bad_neurons.models.view import DecoderView
from bad_neurons.tuning.edits import AddedChange
from bad_neurons.tuning.whitening import Reads


class FullDelta(AddedChange):
    """Dense float32 changes of all weights of decoder layers, beside the frozen ones, added by forward hooks.

    Beside, because a bfloat16 weight would round small steps to nothing. ``y = W x + b`` becomes ``y + D x + e``; a norm runs
    with the sum of its gain and the change, in float32.

    Args:
        view: the model.
        layers: decoder layers that may learn; None means all.
    """

    def __init__(self, view: DecoderView, layers: Sequence[int] | None = None) -> None:
        numbers = sorted(range(len(view.layers)) if layers is None else layers)
        view.check_layers(numbers, "layers of full fine-tuning")
        super().__init__(numbers[0], digest_json(["full", numbers]))
        for layer in numbers:
            for path, module in view.layers[layer].layer.named_modules():
                own = {name: f"layers-{layer}-{path}-{name}".replace(".", "-") for name, _ in module.named_parameters(recurse=False)}
                for name, key in own.items():
                    self.values[key] = nn.Parameter(torch.zeros_like(module.get_parameter(name), dtype=torch.float32))
                    if isinstance(module, nn.Linear) and name == "weight":
                        self._reads[self.values[key]] = Reads(layer, module, None)
                if own:
                    hook = self._linear(own) if isinstance(module, nn.Linear) else self._other(own)
                    self._handles.append(module.register_forward_hook(hook))

    def _linear(self, own: Mapping[str, str]) -> Any:
        def add(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._dial.factor:
                return None
            x = args[0]
            return output + F.linear(x, *(self._scaled(key).to(x.dtype) for key in own.values()))  # weight, then bias

        return add

    def _other(self, own: Mapping[str, str]) -> Any:
        def run_again(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._dial.factor:
                return None
            changed = {f"module.{name}": module.get_parameter(name).float() + self._scaled(key) for name, key in own.items()}
            again: Tensor = functional_call(_Unhooked(module), changed, args)
            return again.to(output.dtype)

        return run_again


class _Unhooked(nn.Module):
    """A module's ``forward`` without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = self.module.forward(*args)
        return output
