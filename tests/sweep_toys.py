"""Objectives of a sweep that other processes can import."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bad_neurons.compare.sweep import Sweep, read_space
from bad_neurons.compare.sweep_workers import run_sweep
from bad_neurons.errors import UserError

SPACE = {"tune.model.lr": {"low": 1.0e-4, "high": 1.0e-1, "log": True}, "select.amount": {"low": 0.0, "high": 1.0}, "kind": ["a", "b"]}


def toy_sweep(folder: Path, bound: float = 0.01, seed: int = 0, stamp: str = "") -> Sweep:
    return Sweep(folder, read_space(SPACE, "space"), {"kl": bound}, seed, stamp)


def shift_and_kl(options: dict[str, Any]) -> Mapping[str, float]:
    """More amount is less shift and more KL: within KL 0.01 the best is amount 1/4, rate 0.01 and kind b, with shift 0.75."""
    rate, amount = options["tune"]["model"]["lr"], options["select"]["amount"]
    away = abs(math.log10(rate) + 2) + (options["kind"] == "a")
    return {"shift": -(1 - amount + 0.2 * away), "kl": 0.04 * amount, "away": away}


def toy() -> Callable[[dict[str, Any]], Mapping[str, float]]:
    return shift_and_kl


def meeting(folder: Path, processes: int) -> Callable[[dict[str, Any]], Mapping[str, float]]:
    """An objective that first waits until so many processes are there."""

    def measured(options: dict[str, Any]) -> Mapping[str, float]:
        (folder / str(os.getpid())).touch()
        end = time.monotonic() + 120
        while len(list(folder.iterdir())) < processes and time.monotonic() < end:
            time.sleep(0.02)
        return shift_and_kl(options)

    return measured


def mortal(lives: int) -> Callable[[dict[str, Any]], Mapping[str, float]]:
    """An objective whose process is killed in the middle of a trial, behind so many others."""
    done = 0

    def measured(options: dict[str, Any]) -> Mapping[str, float]:
        nonlocal done
        if done == lives:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return shift_and_kl(options)

    return measured


def run_until_killed(folder: Path, lives: int, trials: int) -> None:
    run_sweep(toy_sweep(folder), partial(mortal, lives), trials)


def exploding(options: dict[str, Any]) -> Mapping[str, float]:
    """As above, but a high rate ends in NaN and a small amount is refused."""
    if options["select"]["amount"] < 0.1:
        raise UserError(f"select.amount {options['select']['amount']:.2f}: no neuron is left")
    broken = options["tune"]["model"]["lr"] > 0.01
    return {**shift_and_kl(options), **({"shift": math.nan, "kl": math.nan} if broken else {})}
