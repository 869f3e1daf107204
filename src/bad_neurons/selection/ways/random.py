"""By chance: the control of every other way. Under any rule its scores are a random choice of that rule's size."""

from __future__ import annotations

import torch
from torch import Tensor

from bad_neurons.selection.ways.material import Material


def random_scores(material: Material) -> dict[int, Tensor]:
    """Uniform numbers in [0, 1) from the material's seed."""
    generator = torch.Generator().manual_seed(material.seed)
    return {layer: torch.rand(material.units, generator=generator) for layer in material.layers}
