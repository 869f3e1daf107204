"""KLBound: tuning stops where KL on retention text passes the bound, with the last state that was below it."""

from __future__ import annotations

import csv

import lightning as L
import pytest
import torch
from bad_neurons.callbacks import DeltaCheckpoint, GradientMask, KLBound, NumberGuard
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import kl_div, log_softmax

from bad_neurons.artifacts import write_jsonl
from bad_neurons.data.tuning import SycophancyDataModule
from bad_neurons.errors import UserError
from bad_neurons.tuning.delta_file import read_delta

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:Experiment logs directory")


@pytest.fixture
def data(tmp_path, tiny_folder):
    """``data(**options)``: a data module of twelve batches with retention text."""
    rows = [
        {"prompt": f"Tell me about {topic} number {i}{'!' * 3 * i}", "honest": "no" + "o" * i, "sycophantic": "yes", "topic": topic}
        for topic in ("moon", "salt", "bees", "rivers", "glass")
        for i in range(8)
    ]
    write_jsonl(tmp_path / "records.jsonl", rows)
    options = {"batch_tokens": 170, "retention_rows": 1, "retention_tokens": 12}
    return lambda **other: SycophancyDataModule(tiny_folder("gemma2"), str(tmp_path / "records.jsonl"), **{**options, **other})


@pytest.fixture
def run(tmp_path, tuner, neurons, data, quiet):
    """``run(bound, ckpt)``: a two-epoch fit without a KL in the loss; gives the module."""

    def fit(bound, ckpt=None, options=None, **trainer_options):
        module = tuner(lr=0.02, alpha=0.0)
        keep = ModelCheckpoint(tmp_path / "ckpt", "last", enable_version_counter=False)
        log = CSVLogger(tmp_path, name="", version="")
        trainer = L.Trainer(
            **{**quiet, "enable_checkpointing": True, "max_epochs": 2, "limit_val_batches": 0, "log_every_n_steps": 1, **trainer_options},
            callbacks=[GradientMask(neurons()), bound, NumberGuard(), DeltaCheckpoint(tmp_path / "delta.safetensors"), keep],
        )  # fmt: skip
        trainer.logger = log
        trainer.fit(module, datamodule=data(**(options or {})), ckpt_path=ckpt)
        return module

    return fit


def column(path, name):
    with open(path, encoding="utf-8", newline="") as handle:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(handle) if row.get(name)}


def by_transformers(module, pieces):
    """KL(clean || tuned) per token, by two ordinary passes of transformers."""
    total = count = 0
    with torch.no_grad():
        for ids in pieces:
            tuned = log_softmax(module.lm(input_ids=torch.tensor([ids])).logits[0, :-1].double(), -1)
            with module.edit.disabled():
                clean = log_softmax(module.lm(input_ids=torch.tensor([ids])).logits[0, :-1].double(), -1)
            total += float(kl_div(tuned, clean, reduction="sum", log_target=True))
            count += len(ids) - 1
    return total / count


def test_it_stops_behind_the_bound_and_keeps_the_state_before(run, tmp_path, caplog):
    free = run(KLBound(1e9, every_n_steps=2, pieces=5))
    measured = column(tmp_path / "metrics.csv", "kl_bound/kl")
    assert len(measured) == 12  # of 24 steps, every other one
    assert free.trainer.global_step == 24
    last = list(measured.values())[-1]
    assert last == pytest.approx(by_transformers(free, free.trainer.datamodule.retained[-5:]), rel=1e-4)
    values = list(measured.values())
    bound = (values[3] + values[4]) / 2
    assert max(values[:4]) < bound < values[4]  # passed at step 10 and not before

    with caplog.at_level("WARNING", "bad_neurons"):
        stopped = run(KLBound(bound, every_n_steps=2, pieces=5))
    assert stopped.trainer.global_step == 10
    assert column(tmp_path / "metrics.csv", "kl_bound/kept_step") == {9: 8.0}
    said = f"stopped behind step 10: KL on retention text is {values[4]:.3g} nats per token, above --bound.kl {bound:g}; kept is the state"
    assert f"{said} behind step 8 ({values[3]:.3g})" in caplog.text
    assert by_transformers(stopped, stopped.trainer.datamodule.retained[-5:]) == pytest.approx(values[3], rel=1e-4)
    kept = read_delta(tmp_path / "delta.safetensors").deltas
    assert all(torch.equal(kept[name], value) for name, value in stopped.edit.deltas().items())

    again = run(KLBound(bound, every_n_steps=2, pieces=5), ckpt=str(tmp_path / "ckpt" / "last.ckpt"))  # there is nothing to go on to
    assert again.trainer.global_step == 10
    assert all(torch.equal(kept[name], value) for name, value in again.edit.deltas().items())


def test_the_end_of_an_epoch_is_measured(run, tmp_path):
    run(KLBound(1e9, every_n_steps=7, pieces=2), max_epochs=1)
    assert sorted(column(tmp_path / "metrics.csv", "kl_bound/kl")) == [6, 11]


def test_a_trainer_that_may_not_stop_ends_with_the_kept_state_all_the_same(run, tmp_path):
    module = run(KLBound(1e-9, every_n_steps=5), min_epochs=2)
    assert module.trainer.global_step == 24
    assert all(not value.any() for value in read_delta(tmp_path / "delta.safetensors").deltas.values())


def test_where_the_first_measurement_is_above_the_clean_model_is_kept_and_said(run, caplog):
    with caplog.at_level("WARNING", "bad_neurons"):
        module = run(KLBound(1e-9, every_n_steps=5))
    assert module.trainer.global_step == 5
    assert all(not value.any() for value in module.edit.deltas().values())
    assert "behind step 0 (0): the clean model; give a smaller --model.lr or --bound.every_n_steps" in caplog.text


def test_without_a_bound_nothing_is_measured(run, tmp_path):
    module = run(KLBound())
    assert module.trainer.global_step == 24
    assert column(tmp_path / "metrics.csv", "kl_bound/kl") == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl": 0.0}, r"--bound\.kl 0\.0: above 0"),
        ({"every_n_steps": 0}, r"--bound\.every_n_steps 0"),
        ({"pieces": -1}, r"--bound\.pieces -1"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(UserError, match=said):
        KLBound(**options)


def test_retention_text_is_needed(run):
    with pytest.raises(UserError, match=r"--bound\.kl: needs retention text"):
        run(KLBound(0.1), options={"retention": None})
