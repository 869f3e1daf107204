"""DeltaCheckpoint: writes the finished delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.tuning.delta_file import write_delta


class DeltaCheckpoint(Callback):
    """Writes ``delta.safetensors`` when the fit ends: the changed rows and columns, and the neurons that they belong to.

    Lightning's own checkpoints, for resuming, hold the same few tensors and the optimizer's state.

    Args:
        path: where to write it.
    """

    def __init__(self, path: str = "runs/tuning/delta.safetensors") -> None:
        self.path = Path(path)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        edit = getattr(pl_module, "edit", None)
        if not hasattr(edit, "selection"):
            raise UserError(f"DeltaCheckpoint: {type(edit).__name__} has no chosen neurons, and a delta file holds only theirs")

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            edit: Any = pl_module.edit
            write_delta(self.path, edit.selection, edit.deltas())
