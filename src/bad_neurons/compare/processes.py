"""Processes that train side by side, each with a model of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

_GIB_A_PROCESS = 4


def room() -> int:
    """Processes that fit into processor and memory; one where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / _GIB_A_PROCESS)))


@contextmanager
def worker_pool(processes: int, start: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes with their share of the cores each, and no progress bars of their own.

    They are spawned, since a fork of a process that has run a model hangs in its threads.

    Args:
        processes: how many.
        start: called once in each, with ``arguments``.
        arguments: what it gets; they must pickle.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, which the processes do first
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (threads, start, arguments)) as pool:
            yield pool
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _start(threads: int, start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if start:
        start(*arguments)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a pool's process waits for work for ever otherwise."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
