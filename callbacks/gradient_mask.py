"""GradientMask: decides what may learn."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.selection.neurons import read_neurons
from bad_neurons.tuning.edits import EDITS, Mode
from bad_neurons.tuning.module import NeuronTuner


class GradientMask(Callback):
    """Lets the chosen neurons of a :class:`NeuronTuner` learn, and nothing else.

    Args:
        neurons: path of ``neurons.json``.
        mode: ``delta`` trains the chosen rows and columns alone; ``hook`` trains full matrices under a gradient mask,
            the slow reference.
    """

    def __init__(self, neurons: str, mode: Mode = "delta") -> None:
        if mode not in EDITS:
            raise UserError(f"--mask.mode {mode!r}: expected one of {', '.join(EDITS)}")
        self.neurons, self.mode = neurons, mode

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning builds the optimizer before on_fit_start, so the trainable set must exist by the end of setup.
        if not isinstance(pl_module, NeuronTuner):
            raise UserError(f"GradientMask works on a NeuronTuner, not on a {type(pl_module).__name__}")
        if pl_module.edit is None:
            pl_module.attach_neurons(read_neurons(self.neurons), self.mode)
