"""By saliency: the norm of the behaviour's gradient over the weights that a unit owns.

It is the rate at which the behaviour falls when those weights alone go down its gradient, and does not ask what that costs.
"""

from __future__ import annotations

from torch import Tensor

from bad_neurons.selection.ways.behaviour import behaviour_gradients
from bad_neurons.selection.ways.material import Material


def gradient_scores(material: Material) -> dict[int, Tensor]:
    """``|dB / d(weights of the unit)|``, B as the material's objective has it."""
    squares = {at: gradient.square() for at, gradient in behaviour_gradients(material).items()}
    return {layer: total.sqrt().cpu() for layer, total in material.by_unit(squares).items()}
