"""Files between stages: written whole or not at all, and recognisable by digest.

Everything that a stage hands on is JSON, JSONL or safetensors. A file is written beside its final place, synced and
renamed, so a reader never meets half of one. What is written here carries a digest of itself (:mod:`bad_neurons.sealed`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bad_neurons.errors import UserError
from bad_neurons.reading import parse_json, read_text
from bad_neurons.sealed import DIGEST, Format, digest_tensors, sealed, unsealed
from bad_neurons.sealed import digest_json as digest_json
from bad_neurons.writing import PathLike as PathLike
from bad_neurons.writing import written_aside as written_aside

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_METADATA_KEY = "bad_neurons"


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all; an object with a digest of itself, which :func:`read_json` checks."""
    with written_aside(path) as aside:
        content = sealed(value) if isinstance(value, Mapping) else value
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_jsonl(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_json(path: PathLike, what: str | Format) -> Any:
    """Read a JSON file, and check the digest of itself where it has one; what is given back is without it.

    Args:
        path: the file.
        what: what the file should be: words for a message, or a format that it must have, digest included.

    Raises:
        UserError: the file is absent, unreadable, not JSON, of another format, or changed since it was written.
    """
    text = read_text(path, what)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON ({error.msg}); expected {what}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected {what}") from error
    if isinstance(what, Format):
        return what.check(content, path)
    return unsealed(content, path) if isinstance(content, dict) else content


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all. Tensors are made contiguous and moved to the CPU.

    The metadata is one JSON object under the key ``bad_neurons``, with a digest of itself and of the tensors: safetensors writes
    several keys in an order that changes from run to run, and equal content should be equal bytes.
    """
    from safetensors.torch import save_file

    content = {key: value for key, value in sealed(metadata).items() if key != DIGEST}
    with written_aside(path) as aside:
        aside.parent.mkdir(parents=True, exist_ok=True)
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(plain, aside, metadata={_METADATA_KEY: json.dumps({**content, DIGEST: digest_tensors(plain, content)})})


def read_tensors(path: PathLike, what: Format) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file of a format: its tensors and its metadata.

    Raises:
        UserError: the file is absent, truncated, not safetensors, of another format, or changed since it was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            metadata = _metadata(handle)
            if metadata.get("format") != what:
                what.check(metadata, path)
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:  # torch raises these, too
        raise UserError(f"{path}: cannot be read as {what} ({error}); `{what.made_by}` writes it") from error
    found = metadata.pop(DIGEST, None)
    if found != digest_tensors(tensors, metadata):
        raise UserError(f"{path}: damaged or changed since it was written (its digest does not match); run `{what.made_by}` again")
    return tensors, metadata


def _metadata(handle: Any) -> dict[str, Any]:
    metadata = parse_json((handle.metadata() or {}).get(_METADATA_KEY, "{}"))
    return metadata if isinstance(metadata, dict) else {}


def is_whole(path: PathLike, what: Format, key: str) -> bool:
    """Whether a safetensors file is there, undamaged, and was made under ``key``; what is wrong with one that is there is logged."""
    if not Path(path).is_file():
        return False
    try:
        return bool(read_tensors(path, what)[1].get("key") == key)
    except UserError as error:
        log.warning("%s; it is made again", error)
        return False


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
