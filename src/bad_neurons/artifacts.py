"""Files between stages: written whole or not at all, and recognisable by digest.

Everything that a stage hands on is JSON, JSONL or safetensors. A file is written beside its final place, synced and
renamed, so a reader never meets half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bad_neurons.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | os.PathLike[str]

_METADATA_KEY = "bad_neurons"


@contextmanager
def written_aside(path: PathLike) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file or a folder to, and move it into place when the block ends well.

    On any exception what was written aside is removed and whatever stood at ``path`` before stays as it was.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    final = Path(path)
    aside = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        yield aside
        _sync(aside)
        _swap_in(aside, final)
    except OSError as error:
        raise UserError(f"{final}: cannot be written ({error.strerror or error}); nothing before it was changed") from error
    finally:
        _remove(aside)


def _swap_in(aside: Path, final: Path) -> None:
    if aside.is_dir() and final.exists():  # a folder cannot be renamed over a full one
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        os.replace(final, old)
        try:
            os.replace(aside, final)
        except OSError:
            os.replace(old, final)
            raise
        _remove(old)
    else:
        os.replace(aside, final)


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):  # a file stands where a folder should be: nothing can lie in it
            path.unlink(missing_ok=True)


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_jsonl(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_json(path: PathLike, what: str) -> Any:
    """Read a JSON file; ``what`` says in an error message what the file should have been.

    Raises:
        UserError: the file is absent, unreadable, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read as {what} ({reason})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON ({error.msg}); expected {what}") from error


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all. Tensors are made contiguous and moved to the CPU.

    The metadata is one JSON object under the key ``bad_neurons``: safetensors writes several keys in an order that
    changes from run to run, and equal content should be equal bytes.
    """
    from safetensors.torch import save_file

    with written_aside(path) as aside:
        aside.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside, metadata={_METADATA_KEY: json.dumps(metadata)})


def read_tensors(path: PathLike, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors and its metadata, which is empty where it is not ours.

    Raises:
        UserError: the file is absent, truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get(_METADATA_KEY, "{}"))
            return {key: handle.get_tensor(key) for key in handle.keys()}, metadata if isinstance(metadata, dict) else {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as {what} ({error})") from error


def read_metadata(path: PathLike) -> dict[str, Any]:
    """The metadata that :func:`write_tensors` wrote, without the tensors; empty where the file is damaged or not ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get(_METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form; equal values have equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_path(path: PathLike) -> str:
    """SHA-256 (hex) of a file's bytes, or of the names and bytes of all files below a folder; ``absent`` if neither is there."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return digest_json([[p.relative_to(path).as_posix(), digest_path(p)] for p in files])
    if not path.is_file():
        return "absent"
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
