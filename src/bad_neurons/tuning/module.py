"""NeuronTuner: the language model, the loss, and as little computation as the method needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from bad_neurons.artifacts import digest_json
from bad_neurons.checkpoints import seal_checkpoints
from bad_neurons.data.tuning import TuningBatch
from bad_neurons.errors import UserError
from bad_neurons.models.load import Dtype, LanguageModel, load_model
from bad_neurons.models.passes import Frame, Runner, checkpointed, compiled, final_hidden, finish, open_frame, plain, run_layers
from bad_neurons.models.view import view_decoder
from bad_neurons.ranks import rank_of
from bad_neurons.selection.neurons import NeuronSelection
from bad_neurons.tuning.clean_cache import CleanCache, CleanPass
from bad_neurons.tuning.edits import EDITS, Edit, Mode, check_fits
from bad_neurons.tuning.losses import Supervision, loss_sums
from bad_neurons.tuning.shift import log_odds, shift_loss
from bad_neurons.tuning.whitening import WhitenedAdamW, input_moments, whitener

log = logging.getLogger(__name__)
AnyEdit = TypeVar("AnyEdit", bound=Edit)
_MOMENT_PIECES = 128  # pieces of retention text whose inputs the optimizer `whitened` reads


class BatchSums(NamedTuple):
    """The losses of one micro-batch: those of :class:`~bad_neurons.tuning.losses.LossSums`, and one sum over records.

    Attributes:
        loss: what is minimised; carries the gradient.
        ce: cross entropy of the honest answer.
        neutral_kl: KL(teacher || tuned).
        kl: KL(clean || tuned).
        entropy: entropy of the tuned distribution.
        abs_shift: |opinion shift| of the records; 0 where it is not asked for.
    """

    loss: Tensor
    ce: Tensor
    neutral_kl: Tensor
    kl: Tensor
    entropy: Tensor
    abs_shift: Tensor


class NeuronTuner(L.LightningModule):
    """Tunes chosen neurons with target + alpha KL - beta entropy (arXiv 2601.18939; the target is the data module's choice).

    The edit itself comes from the callback :class:`bad_neurons.callbacks.GradientMask`, which attaches it in ``setup``,
    before Lightning builds the optimizer; from Python any other :class:`~bad_neurons.tuning.edits.Edit` of ``tuner.view`` can be
    attached. The clean model is the same model with the edit off, and layers below the first edited one run once for both.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        alpha: weight of KL(clean || tuned) per token.
        beta: weight of the entropy of the tuned distribution per token.
        shift_weight: weight of the opinion shift itself, per record and beside the target, where records have a neutral prompt
            (:mod:`bad_neurons.tuning.shift`); with the data module's target ``shift`` it is all that is asked of answers.
        kl_on: tokens on which the KL is taken: those of the answers, of the retention text beside them, or both.
        lr: learning rate.
        weight_decay: decay of the deltas towards the clean model (of the weights themselves in mode ``hook``).
        optimizer: which optimizer; ``whitened`` is AdamW whose steps cost the retention text about the same in every direction
            (:mod:`bad_neurons.tuning.whitening`), and a learning rate about a third of AdamW's goes as far.
        damping: share of the mean second moment that ``whitened`` adds in each direction; towards 0 it all but forbids what the
            text uses most, far above 1 it is AdamW.
        warmup_steps: steps over which the learning rate rises from zero.
        decay: shape of the learning rate behind the warm-up.
        dtype: dtype of the frozen model; the deltas are float32 whatever it is.
        cache_gb: memory for what the clean model says of each batch, in GB (10^9 bytes); later epochs read it from there.
            0 keeps nothing in memory.
        cache_folder: keep it on disk as well, for what does not fit in memory and for later runs on the same model, data and
            layers; None keeps nothing on disk.
        checkpointing: keep only the inputs of the edited layers for the backward pass and run each layer again in it: less
            memory, about a third more time.
        compile: compile the edited layers with torch.compile; needs a C++ compiler on a processor, and minutes on first use.
    """

    def __init__(
        self,
        model: str,
        alpha: float = 1.0,
        beta: float = 0.0,
        shift_weight: float = 0.0,
        kl_on: Literal["answer", "retention", "both"] = "both",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer: Literal["adamw", "sgd", "whitened"] = "adamw",
        damping: float = 0.03,
        warmup_steps: int = 10,
        decay: Literal["none", "linear"] = "linear",
        dtype: Dtype = "auto",
        cache_gb: float = 2.0,
        cache_folder: str | None = None,
        checkpointing: bool = False,
        compile: bool = False,
        _loaded: LanguageModel | None = None,  # the underscore keeps it off the command line
    ) -> None:
        super().__init__()
        bounded = {"alpha": alpha, "beta": beta, "lr": lr, "weight_decay": weight_decay, "cache_gb": cache_gb, "shift_weight": shift_weight}
        for name, value in bounded.items():
            if not value >= 0:
                raise UserError(f"--model.{name} {value}: at least 0")
        self.shift_weight = shift_weight
        self.alpha, self.beta, self.kl_on, self.lr, self.weight_decay = alpha, beta, kl_on, lr, weight_decay
        if not damping > 0:
            raise UserError(f"--model.damping {damping}: above 0, such as 0.03")
        self.optimizer, self.damping, self.warmup_steps, self.decay = optimizer, damping, warmup_steps, decay
        self.cache_bytes, self.cache_folder = int(cache_gb * 1e9), Path(cache_folder) if cache_folder else None
        self.compile_layers, run = compile, compiled() if compile else plain
        self._run: Runner = checkpointed(run) if checkpointing else run
        loaded = _loaded or load_model(model, dtype, device="cpu")  # Lightning moves it to the rank's device
        self.model_id, self.model_digest, self.lm = loaded.id, loaded.digest, loaded.model
        self.view = view_decoder(loaded.model)
        self.edit: Edit | None = None
        self._window, self._held_out = _no_sums(), _no_sums()  # since the last optimizer step; of a validation or test
        self._halfway: list[Tensor] = []  # gradients of a window in the middle of which a checkpoint was saved

    @classmethod
    def of(cls, loaded: LanguageModel, **options: Any) -> NeuronTuner:
        """A tuner of a model that is already in memory (``dtype`` is then its own), with any of the options above."""
        return cls(loaded.id, **options, _loaded=loaded)

    def attach(self, edit: AnyEdit, cache: CleanCache | None = None) -> AnyEdit:
        """Take an edit that is on the model; it becomes the only thing that learns.

        Args:
            edit: made of ``self.view``.
            cache: ``clean_cache`` of another tuner, shared where what it keeps is the same here (model, dtype, first layer).
        """
        self.edit = edit
        # Whatever the numbers of a clean pass depend on besides the batch itself.
        attention = self.lm.config._attn_implementation
        how = [str(self.lm.dtype), attention, self.compile_layers, torch.__version__, CleanPass._fields]
        origin = digest_json([self.model_digest, edit.first_layer, *how])
        shared = cache is not None and cache.origin == origin
        self.clean_cache = cache if cache is not None and shared else CleanCache(self.cache_bytes, self.cache_folder, origin)
        return edit

    def attach_neurons(self, selection: NeuronSelection, mode: Mode = "delta", cache: CleanCache | None = None) -> Edit:
        """Make an edit of chosen neurons and :meth:`attach` it.

        Raises:
            UserError: the neurons belong to another model.
        """
        check_fits(self.view, selection, self.model_digest)
        return self.attach(EDITS[mode](self.view, selection), cache)

    def losses(self, batch: TuningBatch) -> BatchSums:
        """Sums of the losses over the supervised tokens of one batch."""
        if not len(batch.at):  # a rank may have drawn nothing; it still takes part in the step
            return _nothing(sum(p.sum() for p in self._edit.trainable()))  # type: ignore[arg-type]
        frame = open_frame(self.view, batch.rows)
        clean = self._clean_pass(batch, frame)
        hidden = torch.zeros_like(frame.embedded).masked_scatter_(batch.rows.attention_mask[..., None].bool(), clean.hidden)
        tuned = finish(self.view, frame, hidden, self._edit.first_layer, batch.at, self._run)
        stays = {"answer": batch.answer, "retention": batch.retained, "both": batch.answer + batch.retained}[self.kl_on]
        if batch.pairs is None and not (batch.answer + batch.retained).any():  # nothing, but all ranks run the same layers
            return _nothing(tuned.sum())
        asked = Supervision(clean.final, batch.targets, batch.honest, stays, batch.neutral, clean.teacher)
        if batch.answer.any():
            sums = loss_sums(self.view, tuned, asked, self.alpha, self.beta)
        elif not self.shift_weight:
            raise UserError("--data.target shift: nothing is asked of the answers; give --model.shift_weight above 0, such as 0.3")
        else:  # target `shift`: the head need not run at the words of answers for the other terms
            kept = stays.nonzero().squeeze(-1)
            alone = Supervision(*(t[kept] for t in asked[:4]))  # type: ignore[index]
            sums = loss_sums(self.view, tuned[kept], alone, self.alpha, self.beta)
        if not self.shift_weight or batch.pairs is None or clean.odds is None:
            return BatchSums(*sums, torch.zeros_like(sums.kl))
        shift = shift_loss(self.view, tuned, batch.pairs, clean.odds)
        # The sums are divided by the weight of all answer tokens in the end; a mean over records is wanted of this one.
        weight = self.shift_weight * batch.tokens / batch.pairs.records
        return BatchSums(sums.loss + weight * shift.loss, *sums[1:], shift.shifts.abs().sum())

    def _clean_pass(self, batch: TuningBatch, frame: Frame) -> CleanPass:
        """What the clean model says of the batch: kept from an earlier epoch or run, or computed now."""
        cache = self.clean_cache
        if (kept := cache.get(batch.key)) is not None:
            here = CleanPass(*(None if t is None else t.to(self.device, non_blocking=True) for t in kept))  # type: ignore[arg-type]
            return self._with_odds(here, batch)
        with self._edit.disabled(), torch.no_grad():
            hidden = run_layers(self.view, frame, frame.embedded, last=self._edit.first_layer)
            final = finish(self.view, frame, hidden, self._edit.first_layer, batch.at, self._run)  # as the tuned side: KL 0 at the start
            teacher = final_hidden(self.view, *batch.teacher) if batch.teacher else None
        clean = self._with_odds(CleanPass(hidden[batch.rows.attention_mask.bool()], final, teacher), batch)
        cache.put(batch.key, clean)
        return clean

    def _with_odds(self, clean: CleanPass, batch: TuningBatch) -> CleanPass:
        """With the teacher's log-odds, where the loss asks for them and nobody has computed them yet: they cost a pass of the head."""
        if not self.shift_weight or clean.odds is not None or clean.teacher is None or batch.pairs is None:
            return clean
        return clean._replace(odds=log_odds(self.view, clean.teacher, batch.pairs))

    @override
    def setup(self, stage: str) -> None:
        seal_checkpoints(self.trainer)

    @override
    def configure_callbacks(self) -> list[Callback]:
        from bad_neurons.callbacks import ExactResume, StopInOrder  # they import this module

        return [ExactResume(), StopInOrder()]

    @override
    def on_train_start(self) -> None:
        for parameter, gradient in zip(self._edit.trainable(), self._halfway, strict=False):
            parameter.grad = gradient.to(parameter)
        self._halfway = []

    @override
    def training_step(self, batch: TuningBatch, batch_idx: int) -> Tensor:
        sums = self.losses(batch)
        self._window += self._with_counts(sums, batch)
        # A sum: on_before_optimizer_step divides it by the tokens of the whole window (Lightning#20350). Lightning
        # itself divides by the number of micro-batches, which is undone here.
        return sums.loss * self.trainer.accumulate_grad_batches

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        tokens = self._log_means("train", self._window)
        self._window = _no_sums()
        for parameter in self._edit.trainable():
            if parameter.grad is not None:
                parameter.grad.mul_(self.trainer.world_size / max(tokens, 1.0))  # DDP has averaged over ranks

    def forget_window(self) -> None:
        """Begin the accumulation window anew: a checkpoint that is saved now is to hold nothing of its batches."""
        self._window = _no_sums()

    @override
    def validation_step(self, batch: TuningBatch, batch_idx: int) -> None:
        self._held_out += self._with_counts(self.losses(batch), batch)

    @override
    def on_validation_epoch_start(self) -> None:
        self._held_out = _no_sums()

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self._held_out)

    test_step, on_test_epoch_start = validation_step, on_validation_epoch_start

    @override
    def on_test_epoch_end(self) -> None:
        self._log_means("test", self._held_out)

    def _with_counts(self, sums: BatchSums, batch: TuningBatch) -> Tensor:
        """Each sum of a batch, and the number or weight of what it is over: [terms, 2], float64, on the processor."""
        honest, neutral, retained = (float(t.sum()) for t in (batch.honest, batch.neutral, batch.retained))
        stays = {"answer": honest + neutral, "retention": retained, "both": honest + neutral + retained}[self.kl_on]
        counts = BatchSums(batch.tokens, honest, neutral, stays, honest + neutral, batch.pairs.records if batch.pairs else 0)  # type: ignore[arg-type]
        return torch.tensor([[float(value.detach()), float(count)] for value, count in zip(sums, counts, strict=True)], dtype=torch.float64)

    def _log_means(self, stage: str, sums: Tensor) -> float:
        """Log the means over all processes of what was summed up [terms, 2]; gives the weight that the loss is divided by.

        One sum over processes for all terms: the term that one process has nothing of, another may have.
        """
        total = rank_of(self.trainer).total(sums)
        for name, (value, count) in zip(BatchSums._fields, total.tolist(), strict=True):
            if count and (name != "abs_shift" or self.shift_weight):
                bar, step = name in ("ce", "neutral_kl", "kl"), stage == "train"
                self.log(f"{stage}/{name}", value / count, prog_bar=bar, on_step=step, on_epoch=not step, sync_dist=not step)
        return float(total[0, 1])

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._edit.after_step()

    @override
    def configure_optimizers(self) -> Any:
        parameters = self._edit.trainable()
        if not parameters:
            raise UserError(f"tune: nothing in {type(self._edit).__name__} learns, so it cannot be fitted; measure it as it is")
        optimizer = OPTIMIZERS[self.optimizer](self, parameters)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return 1.0 if self.decay == "none" else max(0.0, (steps - step) / max(1, steps - self.warmup_steps))

    # A checkpoint holds the deltas and what they belong to, never the frozen model (lightning#21053).

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: delta.clone() for name, delta in self._edit.deltas().items()}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        self._edit.restore(state_dict)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bad_neurons"] = {"neurons": self._edit.digest, "model": self.model_digest}
        if self._window[:, 1].any():  # in the middle of an accumulation window, of which each process has a part
            gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).cpu() for p in self._edit.trainable()]
            checkpoint["bad_neurons"]["window"] = rank_of(self.trainer).gather({"sums": self._window, "gradients": gradients})

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found, mine = checkpoint.get("bad_neurons", {}), {"neurons": self._edit.digest, "model": self.model_digest}
        for name, value in mine.items():
            if found.get(name) != value:
                raise UserError(f"--ckpt_path: the checkpoint belongs to other {name} ({str(found.get(name))[:12]}, here {value[:12]})")
        if "window" in found and len(found["window"]) == self.trainer.world_size:  # else the data module refuses
            window = found["window"][self.trainer.global_rank]
            self._window, self._halfway = window["sums"], window["gradients"]
        self._typed_options_win(checkpoint)

    def _typed_options_win(self, checkpoint: dict[str, Any]) -> None:
        """Put learning rate and decay of this fit into the optimizer's state, which would bring back those that it was saved with."""
        for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
            saved = group.get("initial_lr", group["lr"])
            for name, typed, was in (("lr", self.lr, saved), ("weight_decay", self.weight_decay, group["weight_decay"])):
                if typed != was:
                    log.info("--ckpt_path: goes on with --model.%s %g (the checkpoint was saved with %g)", name, typed, was)
            if saved != self.lr:
                group["lr"] = self.lr * (group["lr"] / saved if saved else 1.0)
            group["initial_lr"], group["weight_decay"] = self.lr, self.weight_decay
        for state in checkpoint.get("lr_schedulers", []):
            state["base_lrs"] = [self.lr] * len(state["base_lrs"])

    def whiteners(self) -> dict[torch.nn.Parameter, Tensor]:
        """R of each parameter for the optimizer ``whitened``, from the data module's retention text.

        Raises:
            UserError: there is no retention text, or the edit cannot be whitened.
        """
        sequences = getattr(getattr(self.trainer, "datamodule", None), "retained", [])
        if not sequences:
            raise UserError("--model.optimizer whitened: needs retention text; give --data.retention and --data.retention_rows")
        if not self._edit.reads():
            raise UserError("--model.optimizer whitened: works on chosen rows and columns alone; give --mask.mode delta")
        with self._edit.disabled():
            moments = input_moments(self.view, self._edit.reads(), sequences[:_MOMENT_PIECES])
        return {parameter: whitener(moment, self.damping) for parameter, moment in moments.items()}

    @property
    def _edit(self) -> Edit:
        if self.edit is None:
            raise UserError("tune: no neurons attached; give --mask.neurons neurons.json (callback GradientMask)")
        return self.edit


def _nothing(reached: Tensor) -> BatchSums:
    """Sums over no token, with a gradient of zero for all that a number depends on."""
    zero = reached * 0.0
    return BatchSums(zero, *([zero.detach()] * 5))


def _no_sums() -> Tensor:
    return torch.zeros(len(BatchSums._fields), 2, dtype=torch.float64)


def _adamw(tuner: NeuronTuner, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=tuner.lr, weight_decay=tuner.weight_decay)


def _sgd(tuner: NeuronTuner, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=tuner.lr, weight_decay=tuner.weight_decay)


def _whitened(tuner: NeuronTuner, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return WhitenedAdamW(parameters, tuner.whiteners(), lr=tuner.lr, weight_decay=tuner.weight_decay)


# To add an optimizer, write such a function and add its name to the option `optimizer`.
OPTIMIZERS: dict[str, Callable[[NeuronTuner, list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "whitened": _whitened,
}
