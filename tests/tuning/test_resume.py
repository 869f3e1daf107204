"""Going on in the middle of an epoch, from any batch, is never having stopped: deltas, optimizer, random numbers, metrics.

A fit that a signal stops has saved a checkpoint to go on from.
"""

from __future__ import annotations

import os
import random
import signal

import lightning as L
import numpy as np
import pytest
import torch
from bad_neurons.callbacks import GradientMask, MidEpochCheckpoint, NumberGuard
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from bad_neurons.artifacts import write_jsonl
from bad_neurons.data.tuning import SycophancyDataModule
from bad_neurons.errors import RunError
from bad_neurons.metrics_log import MetricsLog
from bad_neurons.stopping import Stopped

BATCHES = 12
TOPICS = ["moon", "salt", "bees", "rivers", "glass"]


class PowerCutError(Exception):
    pass


class Draws(Callback):
    """Draws from all global random numbers behind every batch, as dropout would."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.drawn.append((trainer.global_step, random.random(), np.random.rand(), float(torch.rand(()))))


class SaveAndCrash(Callback):
    """Saves behind the n-th batch of all, and stops the process there, as far as a test can."""

    def __init__(self, path, number):
        self.path, self.number = path, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch * BATCHES + batch_idx + 1 == self.number:
            trainer.save_checkpoint(self.path)
            raise PowerCutError


class Crash(Callback):
    def __init__(self, number):
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch * BATCHES + batch_idx + 1 == self.number:
            raise PowerCutError


class Signal(Callback):
    """Sends this process a signal in the n-th batch of all."""

    def __init__(self, number, signum=signal.SIGTERM):
        self.number, self.signum = number, signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch * BATCHES + batch_idx + 1 == self.number:
            os.kill(os.getpid(), self.signum)


class Spoil(Callback):
    """Puts a NaN into the gradient of the n-th batch of all."""

    def __init__(self, number):
        self.number = number

    def on_after_backward(self, trainer, pl_module):
        if trainer.current_epoch * BATCHES + trainer.fit_loop.batch_idx + 1 == self.number:
            pl_module.edit.trainable()[0].grad.view(-1)[0] = torch.nan


@pytest.fixture
def fit(tmp_path, tuner, neurons, tiny_folder, quiet):
    """``fit(folder, *callbacks, ckpt)``: two epochs of 12 batches in windows of two; gives the finished module and what was drawn."""
    rows = [
        {"prompt": f"Tell me about {topic} number {i}{'!' * 3 * i}", "honest": "no" + "o" * i, "sycophantic": "yes", "topic": topic}
        for topic in TOPICS
        for i in range(8)
    ]
    write_jsonl(tmp_path / "records.jsonl", rows)

    def run(folder, *callbacks, ckpt=None, seed=0, **options):
        L.seed_everything(seed, verbose=False)
        draws = Draws()
        data = SycophancyDataModule(
            tiny_folder("gemma2"), str(tmp_path / "records.jsonl"), batch_tokens=170, retention_rows=1, retention_tokens=12
        )
        trainer = L.Trainer(
            **{**quiet, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **options,
               "logger": MetricsLog(str(tmp_path / folder / "metrics.csv"))},
            max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0, log_every_n_steps=1, num_sanity_val_steps=0,
            callbacks=[GradientMask(neurons()), draws, *callbacks],
        )  # fmt: skip
        module = tuner(lr=0.01, weight_decay=0.1, warmup_steps=3, decay="linear")
        trainer.fit(module, data, ckpt_path=ckpt)
        return module, draws.drawn

    return run


def state(module):
    """All that a fit leaves, as text and tensors."""
    optimizer = module.trainer.optimizers[0].state_dict()["state"]
    return {
        **module.edit.deltas(),
        **{f"{number}.{name}": value for number, values in optimizer.items() for name, value in values.items()},
        "random": torch.get_rng_state(),
    }


def assert_same(one, other, tmp_path):
    for name, value in state(one).items():
        assert torch.equal(value, state(other)[name]), name
    texts = [(tmp_path / folder / "metrics.csv").read_text() for folder in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 1 + 2 * (BATCHES // 2 + 1)  # a row a step, and one a validation


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("number", [1, 2, 7, 11, 13, 20])  # odd ones are in the middle of a window
def test_from_a_checkpoint_behind_any_batch(fit, tmp_path, number):
    whole, drawn = fit("whole")
    assert [step for step, *_ in drawn] == [(n + 1) // 2 for n in range(1 - 1, 2 * BATCHES)]
    path = tmp_path / "cut" / "some.ckpt"
    with pytest.raises(PowerCutError):
        fit("cut", SaveAndCrash(path, number))
    resumed, again = fit("cut", ckpt=path, seed=5)
    assert again == drawn[number:]
    assert_same(whole, resumed, tmp_path)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("number", [6, 13, 14, 24])
def test_from_the_last_checkpoint_of_an_own_callback(fit, tmp_path, number):
    """``--ckpt_path last``, which is of the second step, or the epoch's end, or the fourth step before the crash."""
    whole, drawn = fit("whole")
    keep = lambda: MidEpochCheckpoint(str(tmp_path / "cut"), every_n_train_steps=2)  # noqa: E731
    with pytest.raises(PowerCutError):
        fit("cut", keep(), Crash(number))
    content = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert content["global_step"] == {6: 2, 13: 6, 14: 6, 24: 10}[number]
    resumed, again = fit("cut", keep(), ckpt="last", seed=5)
    assert again == drawn[2 * content["global_step"] :]
    assert_same(whole, resumed, tmp_path)
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["global_step"] == BATCHES


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_from_the_end_nothing_is_trained_again(fit, tmp_path):
    keep = lambda: MidEpochCheckpoint(str(tmp_path / "cut"))  # noqa: E731
    whole, _ = fit("whole")
    fit("cut", keep())
    resumed, again = fit("cut", keep(), ckpt="last", seed=5)
    assert again == []
    assert all(torch.equal(value, whole.edit.deltas()[name]) for name, value in resumed.edit.deltas().items())
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_lightning_s_own_checkpoints(fit, tmp_path):
    whole, drawn = fit("whole")
    keep = lambda: ModelCheckpoint(tmp_path / "cut", "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)  # noqa: E731
    with pytest.raises(PowerCutError):
        fit("cut", keep(), Crash(19))
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.ckpt")) == [
        "last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt",
    ]  # fmt: skip
    resumed, again = fit("cut", keep(), ckpt="last", seed=5)
    assert again == drawn[16:]
    assert_same(whole, resumed, tmp_path)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("number", "saved"), [(7, 7), (8, 8), (12, 12), (23, 23), (24, 24)])
def test_sigterm_saves_behind_the_batch_or_the_validation_that_follows(fit, tmp_path, number, saved):
    whole, drawn = fit("whole")
    keep = lambda: MidEpochCheckpoint(str(tmp_path / "cut"), every_n_train_steps=100)  # noqa: E731
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        fit("cut", keep(), Signal(number))
    assert (stopped.value.code, stopped.value.name) == (128 + 15, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed, again = fit("cut", keep(), ckpt="last", seed=5)
    assert again == drawn[saved:]
    if saved < 2 * BATCHES:
        assert_same(whole, resumed, tmp_path)
    assert all(torch.equal(value, whole.edit.deltas()[name]) for name, value in resumed.edit.deltas().items())


def test_sigterm_without_a_place_for_a_checkpoint_stops_all_the_same(fit):
    with pytest.raises(Stopped):
        fit("cut", Signal(3))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The `srun` command is available")
def test_slurm_s_signal_requeues_the_job_which_goes_on(fit, tmp_path, monkeypatch):
    whole, drawn = fit("whole")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "night",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "here", "SLURM_NTASKS_PER_NODE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    options = {"default_root_dir": tmp_path / "cut", "plugins": [SLURMEnvironment(auto_requeue=True)]}
    with pytest.raises(Stopped) as stopped:
        fit("cut", MidEpochCheckpoint(str(tmp_path / "cut")), Signal(9, signal.SIGUSR1), **options)
    assert stopped.value.code == 128 + 10
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert (tmp_path / "cut" / "hpc_ckpt_1.ckpt").is_file()
    resumed, again = fit("cut", MidEpochCheckpoint(str(tmp_path / "cut")), seed=5, **options)  # nobody names the checkpoint
    assert again == drawn[9:]
    assert_same(whole, resumed, tmp_path)
    assert not (tmp_path / "cut" / "hpc_ckpt_1.ckpt").exists()


@pytest.mark.parametrize("number", [8, 20])
def test_the_last_good_state_reads_its_batches_again(fit, tmp_path, number):
    whole, _ = fit("whole")
    with pytest.raises(RunError, match="last-good"):
        fit("bad", NumberGuard(), Spoil(number), default_root_dir=tmp_path)
    again, _ = fit("again", ckpt=tmp_path / "last-good.ckpt")
    for name, value in whole.edit.deltas().items():
        assert torch.equal(again.edit.deltas()[name], value), name
