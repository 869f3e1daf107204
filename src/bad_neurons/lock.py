"""One writer a folder: a second one is refused, not mixed in."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bad_neurons.errors import UserError
from bad_neurons.writing import PathLike, sweep

log = logging.getLogger(__name__)

_NAME = ".lock"
# Launchers number their processes here (torchrun, Lightning's own, SLURM, IBM); the first one answers for all.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


@contextmanager
def sole_writer(folder: PathLike) -> Iterator[None]:
    """Nobody else writes below ``folder`` inside the block, and what killed writers left there is gone.

    The lock is the process's own and dies with it, however that ends; nothing has to be removed by hand. Of several processes
    that do one piece of work together, the first one takes it.

    Raises:
        UserError: somebody writes there now, or the folder cannot be written.
    """
    if _rank() != 0:
        yield
        return
    folder = Path(folder)
    new = not folder.exists()
    handle = _locked(folder)
    try:
        sweep(folder)
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                (folder / _NAME).unlink(missing_ok=True)  # while it is still locked: see _is_it
            os.close(handle)
        if new:
            with suppress(OSError):
                folder.rmdir()  # nothing was written


def _rank() -> int:
    return int(next((os.environ[name] for name in _RANKS if os.environ.get(name, "").isdigit()), 0))


def _locked(folder: Path) -> int | None:
    """The open lock file; None where the file system has no locks."""
    path = folder / _NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                _refuse(handle, folder, error)
                return None
            if _is_it(handle, path):
                try:
                    os.truncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
                except OSError:  # a full disk; an open handle would go on locking the folder
                    os.close(handle)
                    raise
                return handle
            os.close(handle)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _refuse(handle: int, folder: Path, error: OSError) -> None:
    owner = os.pread(handle, 200, 0).decode(errors="replace")
    os.close(handle)
    if error.errno == errno.EWOULDBLOCK:
        raise UserError(f"{folder}: another bad-neurons ({owner or 'just started'}) is writing here; wait for it, or give another folder")
    log.warning("%s: this file system has no locks (%s); take care that no second run writes here", folder, error.strerror)


def _is_it(handle: int, path: Path) -> bool:
    """Whether the locked file is still the one at ``path``: the last owner removes it, and a second file may be there by now."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
