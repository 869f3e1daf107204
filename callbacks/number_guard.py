"""NumberGuard: a fit whose numbers go wrong stops, says where, and keeps the last state that was good."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from bad_neurons.errors import RunError
from bad_neurons.numbers import first_nonfinite_output, named, nonfinite


class _Seen(NamedTuple):
    """A micro-batch since the last optimizer step.

    Attributes:
        batch: the batch.
        loss: its loss, a sum over tokens.
    """

    batch: Any
    loss: Tensor


class NumberGuard(Callback):
    """Stops a fit whose loss or gradient is NaN or infinite before the optimizer takes that step.

    The error names the step, the records of the batch and the tensors. A state is known to be good once a loss and a gradient have
    been finite in it, so what is kept is the state before the last step that was taken, as an ordinary checkpoint: the last
    step itself may be what went wrong. Only losses are looked at where a gradient scaler runs (precision 16-mixed), which skips steps
    with infinite gradients itself. All ranks stop together.

    Args:
        enabled: whether to look; the copy of the deltas and of the optimizer's state is renewed with each step.
        filename: name of the checkpoint, in the folder of the others.
    """

    def __init__(self, enabled: bool = True, filename: str = "last-good.ckpt") -> None:
        self.enabled, self.filename = enabled, filename
        self._window: list[_Seen] = []
        self._loops: dict[str, Any] | None = None  # as they were behind the last step
        self._good: dict[str, Any] | None = None  # parts of a checkpoint
        self._step = 0  # behind which that state is
        self._saving = False

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._window:
            self._window[-1] = self._window[-1]._replace(loss=loss.detach())

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.enabled:
            self._window.append(_Seen(batch, torch.zeros(())))

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if not self.enabled:
            return
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            gradients = {}
        wrong = nonfinite({f"loss {number}": seen.loss for number, seen in enumerate(self._window)} | gradients)
        if trainer.strategy.reduce_boolean_decision(not wrong, all=True):
            self._keep(trainer, pl_module)
        else:
            self._stop(trainer, pl_module, [name for name in wrong if name in gradients])

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.enabled and not trainer.fit_loop._should_accumulate():
            self._window = []
            self._loops = copy.deepcopy(trainer.fit_loop.state_dict())

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._saving and self._good:
            checkpoint.update(self._good | {"loops": checkpoint["loops"] | self._good["loops"]})

    def _keep(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Copy the state that has just given finite numbers: it is the one behind the last step."""
        if self._loops is None:
            return
        self._step = trainer.global_step
        self._good = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "state_dict": copy.deepcopy(pl_module.state_dict()),
            "loops": {"fit_loop": self._loops},
            "optimizer_states": [copy.deepcopy(trainer.strategy.optimizer_state(optimizer)) for optimizer in trainer.optimizers],
            "lr_schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        }

    def _stop(self, trainer: L.Trainer, pl_module: Any, gradients: list[str]) -> None:
        losses = [float(seen.loss) for seen in self._window]
        bad = [seen for seen in self._window if not seen.loss.isfinite()] or self._window
        records = [record for seen in bad for record in seen.batch.records]
        first = first_nonfinite_output(pl_module.lm, lambda: [pl_module.losses(seen.batch) for seen in bad])
        parts = [
            f"loss {', '.join(f'{loss:g}' for loss in losses)}",
            f"gradient of {named(gradients)}" if gradients else "",
            f"first in what {first} gives" if first else "",
            f"batch of records {named(records, 12)}" if records else "",
        ]
        raise RunError(
            f"tune: step {trainer.global_step + 1}: NaN or infinity (rank {trainer.global_rank}): {'; '.join(filter(None, parts))}. "
            f"{self._save(trainer, pl_module)}; a smaller --model.lr, --trainer.gradient_clip_val or another --model.dtype may help"
        )

    def _save(self, trainer: L.Trainer, pl_module: Any) -> str:
        """Write the good state, and say so."""
        if self._good is None:
            return "Nothing that was learned before it was good, so no checkpoint is kept"
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        path, self._saving = Path(folder) / self.filename, True
        pl_module.forget_window()
        try:
            trainer.save_checkpoint(path)
        finally:
            self._saving = False
        return f"The state behind step {self._step} is kept: go on from it with --ckpt_path {path} and other options"
