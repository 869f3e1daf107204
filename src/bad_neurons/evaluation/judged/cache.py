"""What was asked once is kept: a JSONL file that is only ever appended to, one line an item."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from bad_neurons.errors import UserError
from bad_neurons.formats import KEPT
from bad_neurons.reading import parse_json, read_bytes
from bad_neurons.sealed import sealed
from bad_neurons.writing import PathLike, sync

log = logging.getLogger(__name__)


class Kept:
    """Rows by key, on disk.

    A row is there once its line is complete and synced; a line that is not, or that has changed since, is ignored with a warning.
    Several processes may put rows in, for a line is written in one piece to the end of the file; threads take turns.

    Args:
        path: the file; it and its folder are made with the first row.

    Raises:
        UserError: the file is there and cannot be read.
    """

    def __init__(self, path: PathLike) -> None:
        self._path = Path(path)
        self._rows = self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep ``row`` under ``key``, now and for the next time.

        Raises:
            UserError: the disk is full or the place cannot be written.
        """
        # What is no text (half of a surrogate pair) could not be written; the digest is of what is.
        plain = json.loads(json.dumps({"format": KEPT, "key": key, **row}, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
        try:
            self._append(json.dumps(sealed(plain), ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror or error})") from error
        self._rows[key] = row

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = not self._path.exists()
        with open(self._path, "a+b", buffering=0) as handle:
            if handle.tell() and not _ends_a_line(handle.fileno()):
                line = b"\n" + line  # what was torn off stays a line of its own, and is ignored
            if handle.write(line) < len(line):  # what fits on a full disk is written without a complaint
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle.fileno())
        if new:
            sync(self._path.parent)

    def _read(self) -> dict[str, dict[str, Any]]:
        lines = read_bytes(self._path, "answers kept by an earlier run").split(b"\n") if self._path.exists() else []
        rows: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = KEPT.check(_parse(line), f"{self._path}: line {number}")
                    rows.setdefault(row["key"], {name: value for name, value in row.items() if name not in ("format", "key")})
                except UserError as error:
                    log.warning("%s; it is ignored, and what it held is asked again", error)
        return rows


def _ends_a_line(file: int) -> bool:
    return os.pread(file, 1, os.fstat(file).st_size - 1) == b"\n"


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line.decode())
    except ValueError:
        return "a line that is not whole"
