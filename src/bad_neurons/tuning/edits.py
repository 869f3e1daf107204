"""What may learn: the rows and columns that the chosen units own, and nothing else.

Two forms of the same edit. :class:`NeuronDelta` keeps only the chosen rows and columns, as float32 parameters beside the
frozen matrices: gradient, optimizer state, checkpoint and all-reduce are as small as the choice, weight decay cannot
touch a frozen weight (pytorch#38581), and switching the edit off gives the clean model for nothing.
:class:`MaskedMatrices` trains the full matrices under a gradient mask, as the paper describes it; it is the reference
that the tests compare with.

Legend: d hidden size, m MLP intermediate size, k rows or columns that the chosen units of a layer own: one a neuron, and the
size of a head for each attention head (:mod:`bad_neurons.selection.axes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bad_neurons.errors import UserError
from bad_neurons.models.view import DecoderView
from bad_neurons.selection.axes import PARTS, owned, units
from bad_neurons.selection.neurons import NeuronSelection
from bad_neurons.tuning.dial import Dial
from bad_neurons.tuning.whitening import Reads

Mode = Literal["delta", "hook"]


class Edit(Protocol):
    """A change of a model that can be trained, scaled, switched off, saved and restored.

    It is on the model from its making until :meth:`remove`. A new one changes nothing, unless its change is given and not learned.

    Attributes:
        first_layer: the lowest layer that it changes; what lies below runs once for the clean and the edited model.
        digest: identifies what may learn; :meth:`deltas` fit only an edit with the same one.
    """

    first_layer: int
    digest: str

    def trainable(self) -> list[nn.Parameter]:
        """The parameters for the optimizer."""

    def reads(self) -> Mapping[nn.Parameter, Reads]:
        """What each parameter multiplies, where it changes a linear map by ``D x``; others are left out."""

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """Context in which the change counts ``factor`` times; contexts inside each other multiply."""

    def disabled(self) -> AbstractContextManager[None]:
        """Context in which the model is the clean one, bit for bit: ``scaled(0)``."""

    def after_step(self) -> None:
        """Called behind every optimizer step."""

    def deltas(self) -> dict[str, Tensor]:
        """The change as float32 tensors by name (``layers.9.gate_proj``)."""

    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the change to what :meth:`deltas` gave."""

    def remove(self) -> None:
        """Take the edit off the model for good."""


def delta_name(layer: int, matrix: str) -> str:
    """Name of a delta tensor in files and state dicts."""
    return f"layers.{layer}.{matrix}"


def check_fits(view: DecoderView, selection: NeuronSelection, model_digest: str | None) -> None:
    """Refuse a selection that was made for another model.

    Raises:
        UserError: digest, axis size or layer numbers differ.
    """
    size = units(view, selection.axis)
    if selection.size != size or max(selection.layers) >= len(view.layers):
        raise UserError(
            f"neurons: chosen in {selection.model_id} ({selection.size} on axis {selection.axis}), but this model has "
            f"{len(view.layers)} layers of {size}; run `bad-neurons select` with this model"
        )
    if model_digest is not None and model_digest != selection.model_digest:
        raise UserError(
            f"neurons: they belong to {selection.model_id} with digest {selection.model_digest[:12]}, but this model's is "
            f"{model_digest[:12]}; run `bad-neurons select` with this model"
        )


class AddedChange(nn.Module):
    """Float32 parameters that start at zero and are added to what frozen modules give, by forward hooks.

    A kind of change registers its parameters in ``values`` (a file's name with dashes, since a parameter's may hold no dot), what
    they multiply in ``_reads`` and its hooks in ``_handles``, and lets each hook ask :meth:`_scaled`.
    """

    def __init__(self, first_layer: int, digest: str) -> None:
        super().__init__()
        self.first_layer, self.digest = first_layer, digest
        self._dial = Dial()
        self.values = nn.ParameterDict()
        self._reads: dict[nn.Parameter, Reads] = {}
        self._handles: list[RemovableHandle] = []

    def _scaled(self, key: str) -> Tensor:
        """A parameter times the factor that it counts now."""
        value: Tensor = self.values[key]
        return value if self._dial.factor == 1 else self._dial.factor * value

    def trainable(self) -> list[nn.Parameter]:
        """The parameters."""
        return list(self.values.values())

    def reads(self) -> Mapping[nn.Parameter, Reads]:
        """What each parameter of a linear map multiplies."""
        return self._reads

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """The change counts ``factor`` times inside the block."""
        return self._dial.scaled(factor)

    def disabled(self) -> AbstractContextManager[None]:
        """The clean model inside the block."""
        return self.scaled(0.0)

    def after_step(self) -> None:
        """Nothing: the frozen weights were never the optimizer's."""

    def deltas(self) -> dict[str, Tensor]:
        """The parameters by file name."""
        return {key.replace("-", "."): value.detach().float() for key, value in self.values.items()}

    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the parameters.

        Raises:
            UserError: other names or shapes.
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


class NeuronDelta(AddedChange):
    """The chosen rows and columns as float32 parameters that start at zero, added by forward hooks.

    ``y = W x`` becomes ``y + D x[idx]`` for chosen columns (D [out, k]) and ``y[idx] + D x`` for chosen rows (D [k, in]).
    """

    def __init__(self, view: DecoderView, selection: NeuronSelection) -> None:
        super().__init__(selection.first_layer, selection.digest)
        self.selection = selection
        for layer, indices in selection.layers.items():
            at = owned(view, selection.axis, indices)
            for matrix, rows in PARTS[selection.axis]:
                linear = view.layers[layer].matrix(matrix)
                shape = (len(at), linear.in_features) if rows else (linear.out_features, len(at))
                key = delta_name(layer, matrix).replace(".", "-")
                device = linear.weight.device
                self.values[key] = nn.Parameter(torch.zeros(shape, device=device))
                self._reads[self.values[key]] = Reads(layer, linear, None if rows else torch.tensor(at))
                self.register_buffer(f"index-{key}", torch.tensor(at, device=device), persistent=False)
                self._handles.append(linear.register_forward_hook(self._hook(key, rows)))

    def _hook(self, key: str, rows: bool) -> Any:
        def add(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._dial.factor:
                return None
            x, at = args[0], self.get_buffer(f"index-{key}")
            delta = self._scaled(key).to(x.dtype)
            if rows:
                return output.index_add(-1, at, F.linear(x, delta))
            return output + F.linear(x.index_select(-1, at), delta)

        return add


class MaskedMatrices(nn.Module):
    """The full matrices as parameters, their gradients masked and everything outside the mask put back after each step.

    Putting back is what makes the mask honest: AdamW's decay moves a weight whose gradient is zero. The paper's own
    form; at 3 % of the neurons its gradients and optimizer state are 33 times those of :class:`NeuronDelta`.
    """

    def __init__(self, view: DecoderView, selection: NeuronSelection) -> None:
        super().__init__()
        self.selection, self.first_layer, self.digest = selection, selection.first_layer, selection.digest
        self._parts: dict[str, tuple[nn.Parameter, Tensor, Tensor, bool]] = {}  # weight, original, indices, rows
        self._handles = []
        for layer, indices in selection.layers.items():
            at = owned(view, selection.axis, indices)
            for matrix, rows in PARTS[selection.axis]:
                weight: nn.Parameter = view.layers[layer].matrix(matrix).weight  # type: ignore[assignment]
                weight.requires_grad_(True)
                index = torch.tensor(at, device=weight.device)
                self._parts[delta_name(layer, matrix)] = (weight, weight.detach().clone(), index, rows)
                self._handles.append(weight.register_hook(self._mask(index, rows)))

    @staticmethod
    def _mask(index: Tensor, rows: bool) -> Any:
        def mask(gradient: Tensor) -> Tensor:
            kept, dim = torch.zeros_like(gradient), 0 if rows else 1
            at = index.to(gradient.device)
            return kept.index_copy(dim, at, gradient.index_select(dim, at))

        return mask

    def trainable(self) -> list[nn.Parameter]:
        """The full matrices of the chosen layers."""
        return [weight for weight, *_ in self._parts.values()]

    def chosen(self) -> Mapping[nn.Parameter, tuple[int, Tensor]]:
        """Of each matrix, the dimension along which units own it (0: rows, 1: columns), and the indices that may learn."""
        return {weight: (0 if rows else 1, index) for weight, _, index, rows in self._parts.values()}

    def reads(self) -> Mapping[nn.Parameter, Reads]:
        """Nothing: what mixes the inputs of a whole matrix mixes frozen columns with chosen ones."""
        return {}

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """The change counts ``factor`` times inside the block, by swapping other matrices in."""
        before = {name: weight.data for name, (weight, *_) in self._parts.items()}
        try:
            for weight, original, *_ in self._parts.values() if factor != 1 else ():
                clean = original.to(weight.device)
                weight.data = clean + factor * (weight.data - clean) if factor else clean
            yield
        finally:
            for name, (weight, *_) in self._parts.items():
                weight.data = before[name]

    def disabled(self) -> AbstractContextManager[None]:
        """The clean model inside the block."""
        return self.scaled(0.0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put every weight outside the mask back, bit for bit."""
        for weight, original, index, rows in self._parts.values():
            dim, at = (0 if rows else 1), index.to(weight.device)
            learned = weight.index_select(dim, at)
            weight.copy_(original).index_copy_(dim, at, learned)

    def deltas(self) -> dict[str, Tensor]:
        """Chosen rows and columns now, minus the original ones."""
        return {
            name: (weight.detach().cpu() - original.cpu()).index_select(0 if rows else 1, index.cpu()).float()
            for name, (weight, original, index, rows) in self._parts.items()
        }

    @torch.no_grad()
    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the chosen rows and columns to original + delta.

        Raises:
            UserError: another set of layers or other shapes.
        """
        check_same(self.deltas(), deltas)
        for name, (weight, original, index, rows) in self._parts.items():
            weight.copy_(original).index_add_(0 if rows else 1, index.to(weight.device), deltas[name].to(weight))

    @torch.no_grad()
    def remove(self) -> None:
        """Put the original matrices back, frozen."""
        for handle in self._handles:
            handle.remove()
        for weight, original, *_ in self._parts.values():
            weight.copy_(original).requires_grad_(False)


EDITS: dict[Mode, type[NeuronDelta] | type[MaskedMatrices]] = {"delta": NeuronDelta, "hook": MaskedMatrices}


def check_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Refuse deltas of another edit.

    Raises:
        UserError: other names or shapes.
    """
    if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
        raise UserError("delta: it was trained with another set of neurons; give the neurons.json that it was trained with")
