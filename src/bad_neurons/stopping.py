"""SIGTERM ends a command in good order: what is being written is taken back, locks go, and the status says so.

A fit answers it in its own way (:class:`bad_neurons.callbacks.StopInOrder`): it saves a checkpoint first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Stopped(SystemExit):
    """The process was asked to stop; it ends with status 128 + the signal's number, as a shell would report it.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises :class:`Stopped` inside the block, where a person or a library has not decided otherwise."""
    here = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if here:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(signum: int, frame: object) -> NoReturn:
    raise Stopped(signum)
