"""FrozenAudit: nothing but the chosen neurons has moved, not by one bit."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from bad_neurons.errors import RunError, UserError
from bad_neurons.numbers import named
from bad_neurons.tuning.frozen import frozen_checksums, moved


class FrozenAudit(Callback):
    """Compares every weight and buffer that may not learn with what it was before the fit, bit for bit, and stops the run if one moved.

    Behind the fit and before each checkpoint is written, so neither a delta nor a checkpoint is kept that was trained on another
    model than it says. Each rank looks at its own copy, and all stop together.

    Args:
        enabled: whether to check; it takes some hundred milliseconds for each GB of weights, three times in a fit of one epoch.
        every_n_steps: check every so many optimizer steps as well; 0 does not.
    """

    def __init__(self, enabled: bool = True, every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise UserError(f"--audit.every_n_steps {every_n_steps}: at least 0")
        self.enabled, self.every_n_steps = enabled, every_n_steps
        self._before: dict[str, str] = {}
        self._checked = 0  # the last optimizer step at which all was well

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Here and not in `setup`: a strategy may have changed dtype and device in between.
        self._before = frozen_checksums(pl_module, pl_module.edit) if self.enabled else {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._checked = trainer.global_step  # which a checkpoint has restored by now

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._checked:
            self._check(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step != self._checked:
            self._check(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # DeltaCheckpoint writes in `on_fit_end`, which comes later.
        self._check(trainer, pl_module)
        self._before = {}

    def _check(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self._before:
            return
        names = moved(self._before, frozen_checksums(pl_module, pl_module.edit))
        if trainer.strategy.reduce_boolean_decision(not names, all=True):
            self._checked = trainer.global_step
            return
        where = f"{named(names)} (rank {trainer.global_rank})" if names else "on another rank"
        raise RunError(
            f"tune: frozen weights changed between step {self._checked} and step {trainer.global_step}: {where}. Something other than the "
            "optimizer wrote there (other code, or faulty memory), so no delta is kept; every checkpoint of this fit was checked before "
            "it was written, and --ckpt_path goes on from one"
        )
