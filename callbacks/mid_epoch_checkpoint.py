"""MidEpochCheckpoint: the checkpoint from which an interrupted fit goes on."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class MidEpochCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, ``last.ckpt``: of every so many steps, and of every epoch's end.

    Unlike :class:`~lightning.pytorch.callbacks.ModelCheckpoint` it does not save behind a batch that a validation follows, for a
    fit that goes on there leaves the validation out (Lightning 2.6); the end of the epoch is saved behind it.

    Args:
        dirpath: folder of the checkpoint.
        every_n_train_steps: optimizer steps from one checkpoint to the next.
        at_epoch_end: whether the end of each epoch is saved as well, the fit's end with it.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 50, at_epoch_end: bool = True) -> None:
        super().__init__(dirpath, self.CHECKPOINT_NAME_LAST, every_n_train_steps=every_n_train_steps, enable_version_counter=False)
        self.at_epoch_end = at_epoch_end

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not validation_follows(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_epoch_end and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the epoch's end comes next, or the next steps."""


def validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation, or the end of the epoch, comes between this batch and the next."""
    every: Any = trainer.val_check_batch
    return trainer.is_last_batch or (bool(every) and math.isfinite(every) and (batch_idx + 1) % every == 0)
