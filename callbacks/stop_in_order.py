"""StopInOrder: a fit that is asked to stop saves a checkpoint first."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from bad_neurons.callbacks.mid_epoch_checkpoint import validation_follows
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from typing_extensions import override

from bad_neurons.stopping import Stopped


class StopInOrder(Callback):
    """Answers SIGTERM, and SLURM's signal before a pre-emption, between two batches: ``last.ckpt`` is saved, and the process ends.

    Lightning stops at SIGTERM without a checkpoint, and at SLURM's signal saves one wherever the fit happens to be, perhaps in
    the middle of a step. Here both wait for the end of the batch, or of the validation behind it. The checkpoint goes beside those
    of the first ``ModelCheckpoint``, where ``--ckpt_path last`` finds it; without one nothing is saved. Under SLURM with
    ``auto_requeue`` its signal also does what Lightning does then: ``hpc_ckpt_<n>.ckpt`` in the Trainer's ``default_root_dir``,
    which the requeued job goes on from, and ``scontrol requeue``. Status: 128 + the signal's number.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._requeue = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None) or trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or 0)
        if threading.current_thread() is threading.main_thread():  # the Trainer puts the former handlers back in the end
            for signum in {signal.SIGTERM, self._requeue} - {0}:
                signal.signal(signum, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        self._asked = signum

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not validation_follows(trainer, batch_idx):
            self._stop_if_asked(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:  # the next fit from this folder is not to begin with them
            for path in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt") if self._requeue else ():
                path.unlink(missing_ok=True)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._asked:  # when there was nothing left to train
            signum, self._asked = self._asked, 0
            raise Stopped(signum)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        alone = trainer.world_size == 1
        if not (self._asked if alone else trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False)):
            return
        if keeper := next((callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)), None):
            name = f"{keeper.CHECKPOINT_NAME_LAST}{keeper.FILE_EXTENSION}"
            trainer.save_checkpoint(Path(keeper.dirpath or trainer.default_root_dir) / name)
        signum, self._asked = self._asked or signal.SIGTERM, 0
        if self._requeue and signum == self._requeue:
            trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]
        raise Stopped(signum)
