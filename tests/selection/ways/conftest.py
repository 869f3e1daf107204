"""A material on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bad_neurons.models.load import LanguageModel
from bad_neurons.selection.ways import Material
from ways_by_hand import LAYERS, RECORDS, TEXTS


@pytest.fixture
def material(tiny: Callable[..., LanguageModel]) -> Callable[..., Material]:
    """``material(family, **changes)``: three records and three texts on a tiny model."""

    def make(family: str = "gemma2", **changes: Any) -> Material:
        return Material(tiny(family), LAYERS, **{"records": RECORDS, "texts": TEXTS, "axis": "intermediate", **changes})

    return make
