"""Files and folders that appear whole or not at all, whatever happens to the process that writes them.

What is written lies beside its final place under a name that says who writes it, is synced, and is renamed; then the folder
that holds it is synced too, so that a power cut takes nothing back. What a killed writer left is told by that name.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bad_neurons.errors import UserError

PathLike = str | os.PathLike[str]

_PARTIAL = re.compile(r"\..+\.(partial|old)-(?P<host>.*)-(?P<pid>\d+)")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def written_aside(path: PathLike) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file or a folder to, and move it into place when the block ends well.

    On any exception what was written aside is removed and whatever stood at ``path`` before stays as it was.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    final = Path(path)
    aside = _beside(final, "partial")
    try:
        _make_folder(final.parent)
        _remove(aside)
        yield aside
        _sync_all(aside)
        _swap_in(aside, final)
        sync(final.parent)
    except UserError:
        raise
    except Exception as error:
        if (failed := disk_error(error)) is None:
            raise
        raise UserError(f"{final}: cannot be written ({failed.strerror or failed}); nothing before it was changed") from error
    finally:
        _remove(aside)


def disk_error(error: BaseException) -> OSError | None:
    """The error of the operating system behind an exception, wherever a library wrapped it; None where there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        if found := re.search(r"\(os error (\d+)\)", str(cause)):  # safetensors writes in Rust
            return OSError(int(found[1]), os.strerror(int(found[1])))
        cause = cause.__cause__ or cause.__context__
    return None


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before anything else happens."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: PathLike) -> None:
    """Remove a file, where it is there, so that a power cut does not bring it back."""
    path = Path(path)
    if path.exists():
        path.unlink(missing_ok=True)
        sync(path.parent)


def sweep(folder: Path) -> None:
    """Remove what killed writers left below a folder. A writer that lives keeps its own, and so does one on another machine."""
    for path in sorted(folder.rglob(".*")):
        if (found := _PARTIAL.fullmatch(path.name)) and found["host"] == platform.node() and not lives(int(found["pid"])):
            _remove(path)


def _beside(final: Path, what: str) -> Path:
    return final.with_name(f".{final.name}.{what}-{platform.node()}-{os.getpid()}")


def lives(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _make_folder(folder: Path) -> None:
    """Make a folder with those above it, each on the disk in the folder that holds it."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(new):
        sync(place.parent)


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for below in sorted(path.rglob("*")):
            sync(below)
    sync(path)


def _swap_in(aside: Path, final: Path) -> None:
    if not aside.is_dir() or not final.exists():
        os.replace(aside, final)
    elif not _exchange(aside, final):  # a folder cannot be renamed over a full one
        old = _beside(final, "old")
        os.replace(final, old)
        try:
            os.replace(aside, final)
        except OSError:
            os.replace(old, final)
            raise
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot (it is not Linux, or the file system is a plain one)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if platform.system() == "Linux" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):  # a file stands where a folder should be: nothing can lie in it
            path.unlink(missing_ok=True)
