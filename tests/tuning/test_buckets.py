"""However records are cut into batches and laid into rows, the losses of an epoch are the same."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.data import tuning as data_module
from bad_neurons.data.tuning import SycophancyDataModule
from helpers import write_records


@pytest.mark.parametrize("target", ["honest", "neutral", "mixed"])
def test_bucketed_is_unbucketed(tuner, choose, tiny, tiny_folder, tmp_path, monkeypatch, target):
    records = write_records(tmp_path / "records.jsonl")
    module = tuner(beta=0.2, cache_gb=0.0)
    edit = module.attach_neurons(choose(tiny()))
    edit.restore({name: 0.3 * torch.randn_like(value) for name, value in edit.deltas().items()})

    def epoch(batch_tokens, row_width):
        """Batches, sums of the losses, and gradients of an epoch."""
        monkeypatch.setattr(data_module, "_ROW_WIDTH", row_width)
        data = SycophancyDataModule(tiny_folder("gemma2"), records, batch_tokens=batch_tokens, target=target, retention=None)
        data.setup("fit")
        batches = list(data.train_dataloader())
        sums = [module.losses(batch) for batch in batches]
        loss = torch.stack([s.loss for s in sums]).sum()
        totals = torch.tensor([[float(value.detach()) for value in s] for s in sums]).sum(0)
        return len(batches), totals, torch.autograd.grad(loss, edit.trainable())

    alone = epoch(1, 0)  # one record a batch, one tree a row
    assert alone[0] == 16
    for batch_tokens, row_width, count in ((400, 0, None), (400, 256, None), (10_000, 0, 1), (10_000, 300, 1)):
        found = epoch(batch_tokens, row_width)
        assert found[0] == count or (count is None and 1 < found[0] < 16)
        torch.testing.assert_close(found[1], alone[1], rtol=1e-4, atol=1e-3)
        for mine, theirs in zip(found[2], alone[2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
