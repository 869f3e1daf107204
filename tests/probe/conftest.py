"""Feature data without a model, and a quiet Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from bad_neurons.probe.data import ProbeBatch, ProbeDataModule


class GivenFeatures(ProbeDataModule):
    """A data module that has its sides, as ``{side: (x, y)}``, instead of extracting them."""

    def __init__(self, sides: dict[str, tuple[Tensor, Tensor]], layers: list[int], widths: list[int]) -> None:
        super().__init__("model", layers)
        self._sides = {side: ProbeBatch(*values) for side, values in sides.items()}
        self.widths, self.model_digest = widths, "0123"


@pytest.fixture
def given_features() -> Callable[..., GivenFeatures]:
    """``given_features(sides, layers, widths)``."""
    return GivenFeatures


@pytest.fixture
def trainer() -> Callable[[], L.Trainer]:
    """``trainer()``: a Trainer as the probe stage makes it, without output."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lambda: L.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **quiet)


@pytest.fixture
def features() -> dict[str, tuple[Tensor, Tensor]]:
    """Three sides of features of a quiet layer (5 wide) and one four times louder (3 wide), with noisy labels."""
    generator = torch.Generator().manual_seed(7)
    sides = {}
    for side, n in (("train", 80), ("validation", 40), ("test", 30)):
        x = torch.randn(n, 8, generator=generator) * torch.tensor([1.0] * 5 + [4.0] * 3) + torch.tensor([0.5] * 5 + [2.0] * 3)
        logits = x @ torch.tensor([1.5, -1.0, 0.0, 0.5, 0.0, 0.3, 0.0, -0.4])
        sides[side] = (x, (torch.rand(n, generator=generator) < logits.sigmoid()).float())
    return sides
