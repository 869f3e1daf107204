"""The chosen neurons and the file that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bad_neurons.artifacts import PathLike, digest_json, read_json, write_json
from bad_neurons.errors import UserError
from bad_neurons.formats import NEURONS

Axis = Literal["residual", "intermediate", "heads"]


@dataclass(frozen=True)
class NeuronSelection:
    """Chosen neurons of one model.

    Attributes:
        axis: ``residual``: index i < d owns column i of ``gate_proj`` and ``up_proj`` and row i of ``down_proj``;
            ``intermediate``: index j < m owns row j of ``gate_proj`` and ``up_proj`` and column j of ``down_proj``;
            ``heads``: query head h owns its rows of ``q_proj`` and its columns of ``o_proj``
            (:mod:`bad_neurons.selection.axes`).
        layers: sorted indices by layer number; a layer without any is left out.
        size: number of indices that each layer has (d, m, or the number of query heads).
        candidates: layers among which the choice was made.
        model_id: what the model was called.
        model_digest: fingerprint of its weights, see :func:`bad_neurons.models.load.model_digest`.
        rule: how they were chosen.
        scores: score of each chosen index, by layer, in the order of ``layers``.
        inputs: digests of the probe and of the other choice that they were made by, where there are such.
    """

    axis: Axis
    layers: dict[int, list[int]]
    size: int
    candidates: list[int]
    model_id: str
    model_digest: str
    rule: dict[str, Any]
    scores: dict[int, list[float]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of chosen neurons."""
        return sum(len(indices) for indices in self.layers.values())

    @property
    def first_layer(self) -> int:
        """The lowest layer that has any."""
        return min(self.layers)

    @property
    def share(self) -> float:
        """Chosen neurons as a share of all neurons of the candidate layers."""
        return self.count / (self.size * len(self.candidates))

    @property
    def digest(self) -> str:
        """Fingerprint of axis and indices; a delta fits only the selection that it was trained with."""
        return digest_json([self.axis, {str(layer): indices for layer, indices in sorted(self.layers.items())}])

    def to_json(self) -> dict[str, Any]:
        """The content of ``neurons.json``."""
        return {
            "format": NEURONS,
            "axis": self.axis,
            "count": self.count,
            "share": self.share,
            "counts": {str(layer): len(indices) for layer, indices in self.layers.items()},
            "size": self.size,
            "candidates": self.candidates,
            "model": {"id": self.model_id, "digest": self.model_digest},
            "rule": self.rule,
            "inputs": self.inputs,
            "layers": {str(layer): indices for layer, indices in self.layers.items()},
            "scores": {str(layer): values for layer, values in self.scores.items()},
        }


def write_neurons(path: PathLike, selection: NeuronSelection) -> None:
    """Write ``neurons.json``."""
    write_json(path, selection.to_json())


def read_neurons(path: PathLike) -> NeuronSelection:
    """Read ``neurons.json``.

    Raises:
        UserError: not such a file, another format, or an empty selection.
    """
    return selection_from_json(read_json(path, NEURONS), str(path))


def selection_from_json(content: Any, where: str) -> NeuronSelection:
    """A selection from parsed JSON; ``where`` names the file in error messages."""
    if not isinstance(content, dict) or content.get("format") != NEURONS:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{where}: format {found!r}; expected {NEURONS!r}, as `bad-neurons select` writes it")
    try:
        selection = NeuronSelection(
            axis=_axis(content["axis"]),
            layers={int(layer): _indices(indices, int(content["size"])) for layer, indices in content["layers"].items()},
            size=int(content["size"]),
            candidates=[int(layer) for layer in content["candidates"]],
            model_id=str(content["model"]["id"]),
            model_digest=str(content["model"]["digest"]),
            rule=dict(content["rule"]),
            inputs=dict(content.get("inputs", {})),
            scores={int(layer): [float(v) for v in values] for layer, values in content.get("scores", {}).items()},
        )
        if foreign := [layer for layer in selection.layers if layer < 0 or layer not in selection.candidates]:
            raise ValueError(f"layers {foreign} are not among the candidates {selection.candidates}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: not a complete neurons.json ({type(error).__name__}: {error}); run `bad-neurons select` again"
        ) from error
    if not selection.count:
        raise UserError(f"{where}: the selection is empty; raise `top_p`, `top_fraction` or `top_k_per_layer`")
    return selection


def _axis(value: Any) -> Axis:
    if value not in get_args(Axis):
        raise ValueError(f"axis {value!r}; expected one of {', '.join(get_args(Axis))}")
    return value  # type: ignore[no-any-return]


def _indices(values: Any, size: int) -> list[int]:
    indices = [int(v) for v in values]
    if indices != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
        raise ValueError(f"indices must be sorted, different and below {size}")
    return indices
