"""What a unit of each axis owns: rows or columns of which linear maps of its layer, and how many of each.

One table for everybody who reads, changes or scores "the weights of a unit". A linear map is stored [out, in]; a unit with
index i owns ``width`` rows, or columns, of it, those from ``i * width`` on.

Legend: d hidden size, m MLP intermediate size, H query heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from bad_neurons.errors import UserError
from bad_neurons.selection.neurons import Axis

if TYPE_CHECKING:
    from bad_neurons.models.view import DecoderView


class Part(NamedTuple):
    """One linear map that units of an axis own something of.

    Attributes:
        matrix: its name, see :meth:`bad_neurons.models.view.LayerView.matrix`.
        rows: whether a unit owns rows of it as stored [out, in]; else it owns columns.
    """

    matrix: str
    rows: bool

    @property
    def dim(self) -> int:
        """The axis of the stored weight along which units lie: 0 for rows, 1 for columns."""
        return 0 if self.rows else 1


PARTS: dict[Axis, tuple[Part, ...]] = {
    "residual": (Part("gate_proj", False), Part("up_proj", False), Part("down_proj", True)),
    "intermediate": (Part("gate_proj", True), Part("up_proj", True), Part("down_proj", False)),
    # Keys and values are shared by groups of query heads, so no single head owns them (arXiv 2409.01658 tunes all four
    # in models without groups).
    "heads": (Part("q_proj", True), Part("o_proj", False)),
}


def unit_width(view: DecoderView, axis: Axis) -> int:
    """Rows, or columns, of each of its linear maps that one unit owns: D on axis ``heads``, else 1."""
    return view.head_dim if axis == "heads" else 1


def units(view: DecoderView, axis: Axis) -> int:
    """Number of units of each layer: d, m or H.

    Raises:
        UserError: the query map holds something beside the queries.
    """
    part, width = PARTS[axis][-1], unit_width(view, axis)
    weight = view.layers[0].matrix(part.matrix).weight
    if axis == "heads" and view.layers[0].matrix("q_proj").out_features != weight.shape[1]:
        raise UserError("axis heads: this model's q_proj holds more than the queries (a gate), so its rows are no heads")
    return int(weight.shape[part.dim]) // width


def owned(view: DecoderView, axis: Axis, indices: Iterable[int]) -> list[int]:
    """Rows, or columns, that the units with ``indices`` own, in their order, each unit's one after the other."""
    width = unit_width(view, axis)
    return [index * width + place for index in indices for place in range(width)]
