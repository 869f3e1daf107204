"""Files between stages: written whole or not at all, and recognisable by digest.

Everything that a stage hands on is JSON, JSONL or safetensors. A file is written beside its final place, synced and
renamed, so a reader never meets half of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bad_neurons.errors import UserError
from bad_neurons.writing import PathLike as PathLike
from bad_neurons.writing import written_aside as written_aside

if TYPE_CHECKING:
    from torch import Tensor

_METADATA_KEY = "bad_neurons"


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
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        return digest_json([[p.relative_to(path).as_posix(), digest_path(p)] for p in files])
    if not path.is_file():
        return "absent"
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _hidden(path: Path) -> bool:
    """Whether a path below an artifact is no part of it: a lock, or what a killed writer left."""
    return any(part.startswith(".") for part in path.parts)
