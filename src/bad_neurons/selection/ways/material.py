"""What every way of scoring neurons may use.

Legend: a unit is a neuron of whatever axis is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from torch import Tensor, nn

from bad_neurons.data.records import Record
from bad_neurons.errors import UserError
from bad_neurons.models.load import LanguageModel
from bad_neurons.models.view import DecoderView, view_decoder
from bad_neurons.probe.module import Probe
from bad_neurons.selection.axes import PARTS, Part, units
from bad_neurons.selection.neurons import Axis

Objective = Literal["odds", "neutral"]
Matrix = tuple[int, str]  # layer and name of a matrix


@dataclass(frozen=True)
class Material:
    """A model, where to look in it, and the data to judge by. What a way needs and does not find here it names in its refusal.

    Attributes:
        lm: the clean model.
        layers: candidate layers.
        axis: what a unit is.
        records: training records.
        texts: paragraphs of unrelated text.
        probe: a trained probe, or None.
        sae: where the SAEs of a probe on SAE features are; not read for a residual probe.
        objective: what counts as the behaviour, see :mod:`bad_neurons.selection.ways.behaviour`.
        damping: share of the mean curvature that is added to each.
        seed: seed of whatever is drawn.
        max_tokens: tokens of one batch after padding.
    """

    lm: LanguageModel
    layers: Sequence[int]
    axis: Axis = "residual"
    records: Sequence[Record] = ()
    texts: Sequence[str] = ()
    probe: Probe | None = None
    sae: str | None = None
    objective: Objective = "odds"
    damping: float = 0.01
    seed: int = 0
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", sorted(set(self.layers)))
        self.view.check_layers(list(self.layers), "--layers")
        if not self.damping > 0:
            raise UserError(f"--damping {self.damping}: above 0, such as 0.01")

    @cached_property
    def view(self) -> DecoderView:
        """The model's parts."""
        return view_decoder(self.lm.model)

    @cached_property
    def units(self) -> int:
        """Units that a layer has."""
        return units(self.view, self.axis)

    @cached_property
    def parts(self) -> dict[Matrix, Part]:
        """The linear maps of the candidate layers of which units own rows or columns."""
        return {(layer, part.matrix): part for layer in self.layers for part in PARTS[self.axis]}

    @property
    def linears(self) -> dict[Matrix, nn.Linear]:
        """The same, the maps alone."""
        return {(layer, matrix): self.view.layers[layer].matrix(matrix) for layer, matrix in self.parts}

    def by_unit(self, values: Mapping[Matrix, Tensor]) -> dict[int, Tensor]:
        """Sum over the weights that each unit owns, [units] a layer, of one value a weight, each [out, in]."""
        sums: dict[int, Tensor] = {}
        for at, part in self.parts.items():
            own = values[at].sum(1 if part.rows else 0).view(self.units, -1).sum(1)
            sums[at[0]] = sums[at[0]] + own if at[0] in sums else own
        return sums


class Way(Protocol):
    """A way of scoring: how much each unit matters."""

    def __call__(self, material: Material) -> dict[int, Tensor]:
        """Scores [units] >= 0 of every candidate layer, float32 on the CPU.

        Raises:
            UserError: the material lacks something.
        """
