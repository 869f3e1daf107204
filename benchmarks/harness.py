"""Runs contenders beside each other and says who took what: the part that all benchmarks share.

Every contender lives in a process of its own, all started by one parent, and sets up (loads the model) once. Then the
parent lets them take turns, round by round, so that a change of the machine's mood hits all of them. Reported are medians
and the peak of resident memory above what the process held when it called :func:`mark_base` (with the one model that
everybody needs loaded, and nothing else yet).
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("bad-neurons", "torch", "transformers", "lightning", "sae-lens", "transformer-lens", "peft", "lm-eval", "scikit-learn")

Round = Callable[[], Mapping[str, Any]]

_base = 0


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes:
        name: its name in the table.
        setup: ``module:function`` below ``benchmarks``; called with ``options`` in the contender's own process, it gives a
            function that does one round and returns what it counted: ``units`` (tokens, items, ...; the rate is
            units / seconds) and anything else worth keeping (numbers that must agree, bytes on disk).
        options: keyword arguments of ``setup``.
        warm_up: rounds before the first that counts.
    """

    name: str
    setup: str
    options: Mapping[str, Any] = field(default_factory=dict)
    warm_up: int = 1


def compare(contenders: list[Contender], rounds: int = 3) -> dict[str, dict[str, Any]]:
    """Let the contenders take turns for some rounds.

    Returns:
        By name: ``seconds`` (median), ``seconds_all``, ``rate`` (units a second, median; where units are counted),
        ``peak_bytes`` (largest resident memory during a round, above the base), ``base_bytes`` (that base), and what the last
        round returned.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch deadlocks in its thread pool
    workers = []
    for contender in contenders:
        mine, theirs = context.Pipe()
        process = context.Process(target=_work, args=(contender, theirs), daemon=True)
        process.start()
        workers.append((contender, process, mine))
        _receive(contender, mine)  # one at a time, so that loading does not swap
    taken: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender, _, pipe in workers:
            pipe.send("go")
            taken[contender.name].append(row := _receive(contender, pipe))
            _say(f"  round {number + 1}/{rounds}  {contender.name:<44} {row['seconds']:8.3f} s  {row['peak_bytes'] / 2**20:8.0f} MiB")
    for _, process, pipe in workers:
        pipe.send("stop")
        process.join()
    return {name: _summary(rows) for name, rows in taken.items()}


def _work(contender: Contender, pipe: Connection) -> None:
    try:
        module, _, function = contender.setup.partition(":")
        run: Round = getattr(importlib.import_module(module), function)(**contender.options)
        base = _base or resident_bytes()
        for _ in range(contender.warm_up):
            run()
        pipe.send({})
        while pipe.recv() == "go":
            reset_peak()
            start = time.perf_counter()
            counted = dict(run())
            seconds = time.perf_counter() - start
            pipe.send({"seconds": seconds, "peak_bytes": max(0, peak_bytes() - base), "base_bytes": base, "counted": counted})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        raise


def _receive(contender: Contender, pipe: Connection) -> dict[str, Any]:
    answer: dict[str, Any] = pipe.recv()
    if "error" in answer:
        raise RuntimeError(f"{contender.name}: {answer['error']}")
    return answer


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [row["seconds"] for row in rows]
    counted = rows[-1]["counted"]
    summary = {
        "seconds": statistics.median(seconds),
        "seconds_all": [round(s, 4) for s in seconds],
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "base_bytes": rows[-1]["base_bytes"],
        **counted,
    }
    if "units" in counted:
        summary["rate"] = counted["units"] / summary["seconds"]
    return summary


def mark_base() -> None:
    """Called inside ``setup``: memory is counted from the level of this moment (default: the end of ``setup``)."""
    global _base
    _base = resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Let :func:`peak_bytes` count from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident memory of this process since :func:`reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def write_results(work: str, results: Mapping[str, Any]) -> Path:
    """Put the results of one benchmark into today's file of this machine, beside those of the others; gives the file."""
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{machine_name()}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content["machine"] = machine()
    content.setdefault("benchmarks", {})[work] = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **results}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and versions of what was compared."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def machine_name() -> str:
    """A short name of the processor for file names, such as ``amd-epyc-2-cores``."""
    words = "".join(c.lower() if c.isalnum() else " " for c in _processor()).split()
    return "-".join([*words[:3], str(os.cpu_count()), "cores"])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
