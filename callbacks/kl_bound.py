"""KLBound: tuning ends where it costs more than it may."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.evaluation.side_effects import CleanStates, text_kl

log = logging.getLogger(__name__)


class KLBound(Callback):
    """Stops the tuning when KL(clean || tuned) on unrelated text passes a bound, and goes back to the last state that was below it.

    It is measured on retention text and not on validation records: there a large KL is the purpose, here it is the cost that
    the evaluation reports. The pieces are the last ones of the retention text, which training, beginning with the first ones,
    reads last or not at all; what the evaluation measures on is not touched. The model computes in its own dtype, and in bfloat16
    rounding alone is a KL of about 0.001.

    In ``metrics.csv`` are ``kl_bound/kl`` of each measurement, and ``kl_bound/kept_step`` where the bound was passed.

    Args:
        kl: nats per token that the KL may be at most; None sets no bound.
        every_n_steps: optimizer steps between measurements.
        pieces: pieces of retention text that are read each time.
    """

    def __init__(self, kl: float | None = None, every_n_steps: int = 10, pieces: int = 16) -> None:
        for name, value in (("kl", 1.0 if kl is None else kl), ("every_n_steps", every_n_steps), ("pieces", pieces)):
            if not value > 0:
                raise UserError(f"--bound.{name} {value}: above 0")
        self.kl, self.every_n_steps, self.pieces = kl, every_n_steps, pieces
        self._clean = CleanStates()
        self._kept: dict[str, Tensor] = {}
        self._kept_step, self._kept_kl, self._passed = 0, 0.0, False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"kept": self._kept, "kept_step": self._kept_step, "kept_kl": self._kept_kl, "passed": self._passed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept, self._kept_step = state_dict["kept"], state_dict["kept_step"]
        self._kept_kl, self._passed = state_dict["kept_kl"], state_dict["passed"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.kl is None:
            return
        if not getattr(getattr(trainer, "datamodule", None), "retained", None):
            raise UserError("--bound.kl: needs retention text to measure on; give --data.retention and --data.retention_rows")
        trainer.should_stop = trainer.should_stop or self._passed  # a fit that goes on behind its end
        if not self._kept:
            self._keep(trainer, pl_module, 0.0)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.kl is None or self._passed or trainer.fit_loop._should_accumulate() or trainer.global_step % self.every_n_steps:
            return
        self._measure(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.kl is not None and not self._passed and trainer.global_step % self.every_n_steps:
            self._measure(trainer, pl_module)  # what a fit ends with is measured, too

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._passed:  # the Trainer goes on where its min_steps ask for it
            pl_module.edit.restore(self._kept)

    def _measure(self, trainer: L.Trainer, pl_module: Any) -> None:
        pieces = trainer.datamodule.retained[-self.pieces :]  # type: ignore[attr-defined]
        kl = trainer.strategy.broadcast(text_kl(pl_module.view, pieces, pl_module.edit, self._clean))
        self._log(trainer, "kl", kl)
        if kl <= (self.kl or 0.0):
            self._keep(trainer, pl_module, kl)
            return
        pl_module.edit.restore(self._kept)
        self._log(trainer, "kept_step", self._kept_step)
        self._passed = trainer.should_stop = True
        log.warning(
            "tune: stopped behind step %d: KL on retention text is %.3g nats per token, above --bound.kl %g; kept is the state behind step "
            "%d (%.3g)%s", trainer.global_step, kl, self.kl, self._kept_step, self._kept_kl,
            "" if self._kept_step else ": the clean model; give a smaller --model.lr or --bound.every_n_steps",
        )  # fmt: skip

    def _log(self, trainer: L.Trainer, name: str, value: float) -> None:
        """Log at this step alone: what a module logs stands in every later row."""
        for logger in trainer.loggers:
            logger.log_metrics({f"kl_bound/{name}": value}, step=trainer.global_step - 1)  # Lightning counts from 0

    def _keep(self, trainer: L.Trainer, pl_module: Any, kl: float) -> None:
        self._kept = {name: value.clone() for name, value in pl_module.edit.deltas().items()}
        self._kept_step, self._kept_kl = trainer.global_step, kl
