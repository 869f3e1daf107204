"""The delta file: only the changed rows and columns, with the choice that they belong to.

``layers.<number>.<matrix>`` holds the [k, in] rows or [out, k] columns that the chosen units of a layer own, float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from bad_neurons.artifacts import PathLike, read_tensors, write_tensors
from bad_neurons.errors import UserError
from bad_neurons.formats import DELTA
from bad_neurons.selection.neurons import NeuronSelection, selection_from_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class DeltaFile(NamedTuple):
    """Content of a delta file.

    Attributes:
        selection: the neurons.
        deltas: change by tensor name.
    """

    selection: NeuronSelection
    deltas: dict[str, Tensor]


def write_delta(path: PathLike, selection: NeuronSelection, deltas: Mapping[str, Tensor]) -> None:
    """Write ``delta.safetensors``."""
    content = selection.to_json()
    del content["scores"], content["inputs"]  # neurons.json keeps them; the indices suffice here
    write_tensors(path, deltas, {"format": DELTA, "selection": content})


def read_delta(path: PathLike) -> DeltaFile:
    """Read ``delta.safetensors``.

    Raises:
        UserError: not such a file, another format or version of it, or damaged.
    """
    deltas, metadata = read_tensors(path, DELTA)
    return DeltaFile(selection_from_json(metadata.get("selection"), str(path)), deltas)


class LoadedDelta(AbstractContextManager["LoadedDelta"]):
    """A delta on a live model. As a context manager it comes off at the end of the block.

    Attributes:
        selection: the neurons that it changes.
        first_layer: the lowest layer that it changes.
    """

    def __init__(self, edit: Any, selection: NeuronSelection) -> None:
        self._edit, self.selection, self.first_layer = edit, selection, selection.first_layer

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """The delta counts ``factor`` times inside the block."""
        return self._edit.scaled(factor)  # type: ignore[no-any-return]

    def disabled(self) -> AbstractContextManager[None]:
        """The model without the delta inside the block."""
        return self._edit.disabled()  # type: ignore[no-any-return]

    def remove(self) -> None:
        """Take the delta off."""
        self._edit.remove()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def load_delta(model: PreTrainedModel, path: PathLike) -> LoadedDelta:
    """Put the delta of a file on a live transformers model; its own weights stay as they are.

    >>> delta = load_delta(model, "runs/quickstart/tuning/delta.safetensors")
    >>> delta.remove()

    Raises:
        UserError: the delta belongs to another model.
    """
    from bad_neurons.models.load import model_digest
    from bad_neurons.models.view import view_decoder
    from bad_neurons.tuning.edits import NeuronDelta, check_fits

    content = read_delta(path)
    view = view_decoder(model)
    check_fits(view, content.selection, model_digest(model))
    edit = NeuronDelta(view, content.selection)
    edit.requires_grad_(False)
    try:
        edit.restore(content.deltas)
    except UserError as error:
        edit.remove()
        raise UserError(f"{path}: its tensors do not fit its own list of neurons; the file is damaged") from error
    return LoadedDelta(edit, content.selection)


def merge_delta(model: PreTrainedModel, path: PathLike) -> NeuronSelection:
    """Add the delta of a file to the model's own weights, for good. Do it in float32: bfloat16 rounds small changes away.

    Raises:
        UserError: the delta belongs to another model.
    """
    import torch

    from bad_neurons.models.view import view_decoder
    from bad_neurons.selection.axes import PARTS, owned
    from bad_neurons.tuning.edits import delta_name

    load_delta(model, path).remove()  # refuses what does not fit before anything changes
    content = read_delta(path)
    view = view_decoder(model)
    with torch.no_grad():
        for layer, indices in content.selection.layers.items():
            at = torch.tensor(owned(view, content.selection.axis, indices), device=view.device)
            for part in PARTS[content.selection.axis]:
                weight = view.layers[layer].matrix(part.matrix).weight
                weight.index_add_(part.dim, at.to(weight.device), content.deltas[delta_name(layer, part.matrix)].to(weight))
    return content.selection
