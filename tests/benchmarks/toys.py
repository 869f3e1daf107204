"""Contenders that the test of the harness lets run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness


def allocating(megabytes: int, log: str) -> harness.Round:
    """Each round writes its process to ``log`` and holds that much memory for a moment."""
    kept = bytearray(8 * 2**20)
    harness.mark_base()

    def run() -> Mapping[str, Any]:
        with Path(log).open("a") as handle:
            handle.write(f"{megabytes} {os.getpid()}\n")
        held = bytearray(megabytes * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        return {"units": megabytes, "kept": len(kept)}

    return run


def failing() -> harness.Round:
    """A contender whose set-up fails."""
    raise ValueError("no such model")
