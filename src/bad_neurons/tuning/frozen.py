"""What must not move while an edit learns: every weight and buffer that is not the edit's own, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bad_neurons.tuning.checksum import checksum
from bad_neurons.tuning.edits import Edit, MaskedMatrices

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value


def frozen_tensors(module: nn.Module, edit: Edit) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters and buffers of ``module`` that ``edit`` may not change.

    Of a matrix that is trained under a mask it is the matrix with zeros in the chosen rows or columns; of one that is divided over
    processes (FSDP2), the part of this one.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a layer that has just run may hold the whole weights, which are other tensors
    learned = {id(parameter) for parameter in edit.trainable()}
    chosen = {id(weight): part for weight, part in edit.chosen().items()} if isinstance(edit, MaskedMatrices) else {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if id(tensor) not in learned:
            yield name, tensor.to_local() if isinstance(tensor, DTensor) else tensor
        elif id(tensor) in chosen:
            dim, index = chosen[id(tensor)]
            yield f"{name} (outside the chosen {('rows', 'columns')[dim]})", _without(tensor, dim, index)


def frozen_checksums(module: nn.Module, edit: Edit) -> dict[str, str]:
    """Checksum of each of :func:`frozen_tensors`, by name."""
    return {name: checksum(tensor) for name, tensor in frozen_tensors(module, edit)}


def moved(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose checksum is another one, or that are new or gone."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _without(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """A copy with zeros at some rows (``dim`` 0) or columns (1). As integers: as a float a signalling NaN may change when it is copied."""
    bits = weight.detach().view(_INTEGERS[weight.element_size()])
    return bits.index_fill(dim, index.to(weight.device), 0)
