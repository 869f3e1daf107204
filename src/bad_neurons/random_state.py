"""The state of all global random numbers as plain values, as a checkpoint without code can hold them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's random numbers, and of each GPU's."""
    numpy = np.random.get_state(legacy=False)
    inner = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in numpy["state"].items()}
    return {
        "python": list(random.getstate()),
        "numpy": {**numpy, "state": inner},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what :func:`random_state` gave. GPUs are left alone where there are more or fewer than then."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
