"""Shared fixtures: tiny model folders, neurons chosen in them, seeds, and no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

from bad_neurons.models.load import LanguageModel, load_model
from bad_neurons.models.view import view_decoder
from bad_neurons.selection.axes import units
from bad_neurons.selection.neurons import Axis, NeuronSelection
from bad_neurons.testing import FAMILIES, save_tiny_model

torch.set_num_threads(1)  # tiny models: threads only get in each other's way, and sums in one order are the same bits

CHOSEN = {1: [0, 5, 15], 3: [2]}  # indices that both axes of a tiny model's MLP (d 16, m 24) have
HEADS = {1: [0, 1], 3: [1]}  # of its two heads of size 8


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, except under ``-m gpu``: everything else is to give the same numbers on every machine."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``tiny_folder(family, seed)``: folder of a tiny model, saved once a session."""

    @cache
    def folder(family: str = "gemma2", seed: int = 0) -> str:
        return save_tiny_model(tmp_path_factory.mktemp(f"{family}-{seed}"), family, seed)  # type: ignore[arg-type]

    return folder


@pytest.fixture
def tiny(tiny_folder: Callable[..., str]) -> Callable[..., LanguageModel]:
    """``tiny(family, seed)``: a tiny model in float32, loaded anew, so a test may change it."""
    return lambda family="gemma2", seed=0: load_model(tiny_folder(family, seed), "float32")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every supported family."""
    return str(request.param)


@pytest.fixture
def choose() -> Callable[..., NeuronSelection]:
    """``choose(lm, axis, layers)``: a selection of neurons of a tiny model."""

    def chosen(lm: LanguageModel, axis: Axis = "residual", layers: dict[int, list[int]] | None = None) -> NeuronSelection:
        layers = layers or (HEADS if axis == "heads" else CHOSEN)
        view = view_decoder(lm.model)
        return NeuronSelection(axis, layers, units(view, axis), list(range(4)), lm.id, lm.digest, {"name": "by hand"})

    return chosen


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [3, 20] of texts longer than the tiny models' sliding window of 8."""
    return torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder for converted models."""
    monkeypatch.setenv("BAD_NEURONS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
