"""Full fine-tuning, as a correction to compare with: every weight of the decoder layers may learn.

Embeddings and head stay as they are, and so does the norm in front of the head: the losses read the clean and the tuned
hidden states through one frozen head (:mod:`bad_neurons.models.head`), and kept clean passes rest on the embeddings.

Legend: a linear map is stored [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bad_neurons.artifacts import digest_json
from bad_neurons.models.view import DecoderView
from bad_neurons.tuning.dial import Dial
from bad_neurons.tuning.edits import check_same
from bad_neurons.tuning.whitening import Reads


class FullDelta(nn.Module):
    """Dense float32 changes of all weights of decoder layers, beside the frozen ones, added by forward hooks.

    Beside, because a bfloat16 weight would round small steps to nothing. ``y = W x + b`` becomes ``y + D x + e``; a norm runs
    with the sum of its gain and the change, in float32.

    Args:
        view: the model.
        layers: decoder layers that may learn; None means all.
    """

    def __init__(self, view: DecoderView, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        numbers = sorted(range(len(view.layers)) if layers is None else layers)
        view.check_layers(numbers, "layers of full fine-tuning")
        self._dial, self.first_layer = Dial(), numbers[0]
        self.values = nn.ParameterDict()
        self._reads: dict[nn.Parameter, Reads] = {}
        self._handles = []
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
        self.digest = digest_json(["full", numbers])

    def _scaled(self, key: str) -> Tensor:
        value: Tensor = self.values[key]
        return value if self._dial.factor == 1 else self._dial.factor * value

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

    def trainable(self) -> list[nn.Parameter]:
        """One parameter for each of the layers' own."""
        return list(self.values.values())

    def reads(self) -> Mapping[nn.Parameter, Reads]:
        """All inputs of the linear maps."""
        return self._reads

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """The changes count ``factor`` times inside the block."""
        return self._dial.scaled(factor)

    def disabled(self) -> AbstractContextManager[None]:
        """The clean model inside the block."""
        return self.scaled(0.0)

    def after_step(self) -> None:
        """Nothing: the frozen weights were never the optimizer's."""

    def deltas(self) -> dict[str, Tensor]:
        """The changes by name (``layers.9.mlp.gate_proj.weight``)."""
        return {key.replace("-", "."): value.detach().float() for key, value in self.values.items()}

    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the changes.

        Raises:
            UserError: other layers or shapes.
        """
        check_same(self.deltas(), deltas)
        with torch.no_grad():
            for key, value in self.values.items():
                value.copy_(deltas[key.replace("-", ".")])

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Unhooked(nn.Module):
    """A module's ``forward`` without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = self.module.forward(*args)
        return output
