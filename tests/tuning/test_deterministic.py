"""``--trainer.deterministic true`` refuses no operation of a fit, and on a processor changes no bit."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def _flag_put_back(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning sets it, too
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_flag_put_back")
@pytest.mark.parametrize("axis", ["residual", "intermediate", "heads"])
def test_the_flag_changes_no_bit(tuner, neurons, fit, make_batch, axis):
    lengths = [(5, 4), (9, 2), (7, 7)]
    batches = [make_batch(lengths, [11], seed=i, teacher=lengths if i % 2 else None) for i in range(4)]
    free, strict = (
        fit(tuner(lr=0.01, beta=0.1), neurons(axis), batches, deterministic=flag, gradient_clip_val=1.0).steps[-1] for flag in (False, True)
    )
    assert torch.are_deterministic_algorithms_enabled()
    for name, value in free.items():
        assert value.abs().max() > 1e-3
        assert torch.equal(value, strict[name]), name
