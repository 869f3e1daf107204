"""What may learn: the chosen rows and columns of the MLP matrices, and nothing else.

Two forms of the same edit. :class:`NeuronDelta` keeps only the chosen rows and columns, as float32 parameters beside the
frozen matrices: gradient, optimizer state, checkpoint and all-reduce are as small as the choice, weight decay cannot
touch a frozen weight (pytorch#38581), and switching the edit off gives the clean model for nothing.
:class:`MaskedMatrices` trains the full matrices under a gradient mask, as the paper describes it; it is the reference
that the tests compare with.

Legend: d hidden size, m MLP intermediate size, k chosen neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bad_neurons.errors import UserError
from bad_neurons.models.view import MATRICES, DecoderView, LayerView
from bad_neurons.selection.neurons import Axis, NeuronSelection

Mode = Literal["delta", "hook"]


class Edit(Protocol):
    """A change of chosen neurons that can be trained, switched off, saved and restored.

    Attributes:
        selection: the neurons.
        first_layer: the lowest layer that it changes; what lies below runs once for the clean and the edited model.
    """

    selection: NeuronSelection
    first_layer: int

    def trainable(self) -> list[nn.Parameter]:
        """The parameters for the optimizer."""

    def disabled(self) -> Any:
        """Context in which the model is the clean one."""

    def after_step(self) -> None:
        """Called behind every optimizer step."""

    def deltas(self) -> dict[str, Tensor]:
        """Change of the chosen rows and columns by name (``layers.9.gate_proj``), float32."""

    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the change to what :meth:`deltas` gave."""

    def remove(self) -> None:
        """Take the edit off the model for good."""


def owns_rows(axis: Axis, matrix: str) -> bool:
    """Whether a neuron of ``axis`` owns rows of ``matrix`` as stored [out, in]; else it owns columns."""
    return (matrix == "down_proj") == (axis == "residual")


class OwnedPart(NamedTuple):
    """One linear map of a layer, of which each unit owns as many rows or columns as every other, one unit behind the other.

    Attributes:
        matrix: its name.
        linear: the map.
        rows: whether they are rows of the weight as stored [out, in]; else columns.
    """

    matrix: str
    linear: nn.Linear
    rows: bool


def owned_parts(layer: LayerView, axis: Axis) -> list[OwnedPart]:
    """The linear maps of a layer of which the units of ``axis`` own rows or columns."""
    return [OwnedPart(matrix, layer.matrix(matrix), owns_rows(axis, matrix)) for matrix in MATRICES]


def axis_size(view: DecoderView, axis: Axis) -> int:
    """Number of units that a layer has on ``axis``."""
    return view.d_model if axis == "residual" else view.d_mlp


def delta_name(layer: int, matrix: str) -> str:
    """Name of a delta tensor in files and state dicts."""
    return f"layers.{layer}.{matrix}"


def check_fits(view: DecoderView, selection: NeuronSelection, model_digest: str | None) -> None:
    """Refuse a selection that was made for another model.

    Raises:
        UserError: digest, axis size or layer numbers differ.
    """
    size = axis_size(view, selection.axis)
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


class NeuronDelta(nn.Module):
    """The chosen rows and columns as float32 parameters that start at zero, added by forward hooks.

    ``y = W x`` becomes ``y + D x[idx]`` for chosen columns (D [out, k]) and ``y[idx] + D x`` for chosen rows (D [k, in]).
    """

    def __init__(self, view: DecoderView, selection: NeuronSelection) -> None:
        super().__init__()
        self.selection, self.first_layer = selection, selection.first_layer
        self.enabled = True
        self.values = nn.ParameterDict()
        self._handles = []
        for layer, indices in selection.layers.items():
            for matrix in MATRICES:
                linear = view.layers[layer].matrix(matrix)
                rows = owns_rows(selection.axis, matrix)
                shape = (len(indices), linear.in_features) if rows else (linear.out_features, len(indices))
                key = delta_name(layer, matrix).replace(".", "-")  # a dot is not allowed in a parameter's name
                device = linear.weight.device
                self.values[key] = nn.Parameter(torch.zeros(shape, device=device))
                self.register_buffer(f"index-{key}", torch.tensor(indices, device=device), persistent=False)
                self._handles.append(linear.register_forward_hook(self._hook(key, rows)))

    def _hook(self, key: str, rows: bool) -> Any:
        def add(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.enabled:
                return None
            x, at = args[0], self.get_buffer(f"index-{key}")
            delta = self.values[key].to(x.dtype)
            if rows:
                return output.index_add(-1, at, F.linear(x, delta))
            return output + F.linear(x.index_select(-1, at), delta)

        return add

    def trainable(self) -> list[nn.Parameter]:
        """One parameter a layer and matrix."""
        return list(self.values.values())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The clean model inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def after_step(self) -> None:
        """Nothing: the frozen matrices were never the optimizer's."""

    def deltas(self) -> dict[str, Tensor]:
        """The parameters by file name."""
        return {key.replace("-", "."): value.detach().float() for key, value in self.values.items()}

    def restore(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the parameters.

        Raises:
            UserError: another set of layers or other shapes.
        """
        _check_same(self.deltas(), deltas)
        with torch.no_grad():
            for key, value in self.values.items():
                value.copy_(deltas[key.replace("-", ".")])

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class MaskedMatrices(nn.Module):
    """The full matrices as parameters, their gradients masked and everything outside the mask put back after each step.

    Putting back is what makes the mask honest: AdamW's decay moves a weight whose gradient is zero. The paper's own
    form; at 3 % of the neurons its gradients and optimizer state are 33 times those of :class:`NeuronDelta`.
    """

    def __init__(self, view: DecoderView, selection: NeuronSelection) -> None:
        super().__init__()
        self.selection, self.first_layer = selection, selection.first_layer
        self._parts: dict[str, tuple[nn.Parameter, Tensor, Tensor, bool]] = {}  # weight, original, indices, rows
        self._handles = []
        for layer, indices in selection.layers.items():
            for matrix in MATRICES:
                weight: nn.Parameter = view.layers[layer].matrix(matrix).weight  # type: ignore[assignment]
                weight.requires_grad_(True)
                rows = owns_rows(selection.axis, matrix)
                index = torch.tensor(indices, device=weight.device)
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

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The clean model inside the block, by swapping the original matrices in."""
        edited = {name: weight.data for name, (weight, *_) in self._parts.items()}
        try:
            for weight, original, *_ in self._parts.values():
                weight.data = original.to(weight.device)
            yield
        finally:
            for name, (weight, *_) in self._parts.items():
                weight.data = edited[name]

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
        _check_same(self.deltas(), deltas)
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


def _check_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
        raise UserError("delta: it was trained with another set of neurons; give the neurons.json that it was trained with")
