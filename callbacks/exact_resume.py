"""ExactResume: a fit that goes on from a checkpoint ends with the same bits as one that never stopped."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from bad_neurons.metrics_log import MetricsLog, row_of
from bad_neurons.random_state import random_state, set_random_state

_KEY = "bad_neurons.exact_resume"


class ExactResume(Callback):
    """Adds to every checkpoint what Lightning leaves out: the state of the random numbers, and the metrics up to there.

    The modules of this package bring it along for every Trainer.
    """

    def __init__(self) -> None:
        self._random: dict[str, Any] | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":  # what is measured afterwards goes below the metrics of the fit
            for log in _logs(trainer):
                log.restore(log.path.read_text(encoding="utf-8") if log.path.is_file() else "")

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = {"random": random_state(), "metrics": [log.text(*_unlogged(trainer)) for log in _logs(trainer)]}

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or _KEY not in checkpoint:
            return
        self._random = checkpoint[_KEY]["random"]
        for log, text in zip(_logs(trainer), checkpoint[_KEY]["metrics"], strict=False):
            log.restore(text)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning 2.6 loses the loader's position where an optimizer has asked how many steps there will be.
        trainer.fit_loop._load_combined_loader_states()
        if self._random is not None:
            set_random_state(self._random)
            self._random = None


def _logs(trainer: L.Trainer) -> list[MetricsLog]:
    return [log for log in trainer.loggers if isinstance(log, MetricsLog)]


def _unlogged(trainer: L.Trainer) -> list[dict[str, str]]:
    """The row of the batch behind which a checkpoint is being saved: Lightning logs it afterwards, and not again on going on."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    inside = loop.batch_progress.current.processed > loop.batch_progress.current.completed  # type: ignore[attr-defined]
    if not inside or loop._should_accumulate() or not connector.should_update_logs:
        return []
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    return [row_of({"epoch": trainer.current_epoch, **metrics}, loop._batches_that_stepped)] if metrics else []
