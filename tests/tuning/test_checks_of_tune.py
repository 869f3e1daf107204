"""The checks of a fit as ``bad-neurons tune fit`` has them: on without being asked for, and one line when they find something."""

from __future__ import annotations

import pytest
import torch
from bad_neurons.callbacks import FrozenAudit

from bad_neurons.cli import main
from helpers import write_records

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tune(tmp_path, tiny_folder, neurons, capsys):
    """``tune(*options)``: status and what was said on standard error, of a fit of one epoch."""

    def run(*options):
        arguments = {
            "--model.model": tiny_folder("gemma2"), "--model.dtype": "float32", "--data.records": write_records(tmp_path / "records.jsonl"),
            "--data.batch_tokens": "170", "--data.retention_rows": "1", "--data.retention_tokens": "16", "--mask.neurons": neurons(),
            "--delta.path": str(tmp_path / "delta.safetensors"), "--trainer.max_epochs": "1", "--trainer.accelerator": "cpu",
            "--trainer.default_root_dir": str(tmp_path), "--trainer.limit_val_batches": "0", "--trainer.logger": "false",
            "--trainer.enable_progress_bar": "false", "--trainer.enable_model_summary": "false",
        }  # fmt: skip
        status = main(["tune", "fit", *(word for pair in arguments.items() for word in pair), *options])
        return status, [line for line in capsys.readouterr().err.splitlines() if line.startswith("bad-neurons: ")]

    return run


def test_numbers_that_go_wrong(tune, tmp_path):
    status, said = tune("--model.lr", "1e36", "--model.warmup_steps", "0", "--trainer.gradient_clip_val", "null")
    assert (status, len(said)) == (2, 1)
    assert said[0].startswith("bad-neurons: tune: step 2: NaN or infinity (rank 0): loss nan; gradient of edit.values.layers-1-gate_proj, ")
    assert "; first in what model.layers.1." in said[0]
    assert "; batch of records " in said[0]
    assert not (tmp_path / "delta.safetensors").exists()


def test_a_bit_that_moves(tune, tmp_path, monkeypatch):
    sound = FrozenAudit.on_train_start

    def fault(self, trainer, pl_module):
        sound(self, trainer, pl_module)
        with torch.no_grad():
            pl_module.lm.model.embed_tokens.weight.view(torch.int32)[-1, -1] ^= 1

    monkeypatch.setattr(FrozenAudit, "on_train_start", fault)
    status, said = tune()
    assert (status, len(said)) == (2, 1)
    assert "frozen weights changed between step 0 and step " in said[0]
    assert "lm.model.embed_tokens.weight (rank 0)" in said[0]
    assert not (tmp_path / "delta.safetensors").exists()
    assert not list(tmp_path.rglob("*.ckpt"))
    assert tune("--audit.enabled", "false") == (0, [])
    assert (tmp_path / "delta.safetensors").is_file()


def test_a_bound_on_kl(tune, tmp_path):
    assert tune("--bound.kl", "1e-9", "--bound.every_n_steps", "2") == (0, [])
    assert (tmp_path / "delta.safetensors").is_file()
    status, said = tune("--bound.kl", "0.1", "--data.retention", "null")
    assert (status, len(said)) == (2, 1)
    assert "needs retention text" in said[0]
