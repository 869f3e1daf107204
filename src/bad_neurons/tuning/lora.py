"""LoRA (arXiv 2106.09685) through peft, as a correction to compare with: low-rank changes of linear maps of chosen layers.

Legend: r rank; a map [out, in] gets A [r, in] and B [out, r], and its change is B A.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from bad_neurons.artifacts import digest_json
from bad_neurons.errors import UserError
from bad_neurons.models.view import ATTENTION, MATRICES, DecoderView
from bad_neurons.tuning.dial import Dial
from bad_neurons.tuning.edits import check_same, delta_name
from bad_neurons.tuning.whitening import Reads

ALL_MAPS = (*ATTENTION, *MATRICES)
_ADAPTER = "default"


def lora_rank(view: DecoderView, layers: Sequence[int], parameters: int, matrices: Sequence[str] = MATRICES) -> int:
    """The rank, at least 1, whose number of parameters is closest to ``parameters``: each rank costs in + out a map."""
    maps = [view.layers[layer].matrix(name) for layer in layers for name in matrices]
    return max(1, round(parameters / sum(linear.in_features + linear.out_features for linear in maps)))


class LoraEdit:
    """Adapters of peft in the model itself, in float32 whatever the model is; B starts at zero, so the model starts clean.

    The change is scaled by 1 (peft's ``lora_alpha`` is the rank): how far it goes is the learning rate's matter.

    Args:
        view: the model.
        layers: decoder layers that are adapted.
        rank: r, see :func:`lora_rank`.
        matrices: which maps of each layer, of :data:`ALL_MAPS`.
        seed: seed of the random A.
    """

    def __init__(self, view: DecoderView, layers: Sequence[int], rank: int, matrices: Sequence[str] = MATRICES, seed: int = 0) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        view.check_layers(list(layers), "layers of LoRA")
        if rank < 1:
            raise UserError(f"rank of LoRA {rank}: at least 1")
        linears = {delta_name(layer, name): view.layers[layer].matrix(name) for layer in sorted(layers) for name in matrices}
        paths = {module: path for path, module in view.model.named_modules()}
        exactly = "|".join(re.escape(paths[linear]) for linear in linears.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly)
            self._peft = LoraModel(view.model, config, _ADAPTER)
        self._maps = {name: view.model.get_submodule(paths[linear]) for name, linear in linears.items()}
        for module in self._maps.values():  # LoraModel makes them in the map's own dtype
            module.lora_A.float(), module.lora_B.float()  # type: ignore[operator, union-attr]
        parameters = self._parameters()
        self._reads = {parameters[f"{name}.A"]: Reads(int(name.split(".")[1]), linear, None) for name, linear in linears.items()}
        self._dial = Dial()
        self.first_layer = min(layers)
        self.digest = digest_json(["lora", rank, sorted(linears)])

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{side}": getattr(m, f"lora_{side}")[_ADAPTER].weight for name, m in self._maps.items() for side in "AB"}

    def trainable(self) -> list[nn.Parameter]:
        """A and B of each map."""
        return list(self._parameters().values())

    def reads(self) -> Mapping[nn.Parameter, Reads]:
        """All inputs of the maps, which A reads; B reads A's."""
        return self._reads

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """The products B A count ``factor`` times inside the block."""
        try:
            with self._dial.scaled(factor):
                self._apply()
                yield
        finally:
            self._apply()

    def _apply(self) -> None:
        for module in self._maps.values():
            module.enable_adapters(self._dial.factor != 0)  # type: ignore[operator]
            module.set_scale(_ADAPTER, self._dial.factor)  # type: ignore[operator]

    def disabled(self) -> AbstractContextManager[None]:
        """The clean model inside the block."""
        return self.scaled(0.0)

    def after_step(self) -> None:
        """Nothing: the frozen matrices were never the optimizer's."""

    def deltas(self) -> dict[str, Tensor]:
        """A and B of each map by name (``layers.9.gate_proj.A``)."""
        return {name: value.detach().float() for name, value in self._parameters().items()}

    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set A and B.

        Raises:
            UserError: other layers, maps or rank.
        """
        check_same(self.deltas(), deltas)
        with torch.no_grad():
            for name, value in self._parameters().items():
                value.copy_(deltas[name])

    def remove(self) -> None:
        """Put the plain linear maps back."""
        self._peft.unload()
