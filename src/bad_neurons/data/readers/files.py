"""Where a public file lies, and reading it with an error that names the line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from bad_neurons.artifacts import PathLike
from bad_neurons.errors import UserError
from bad_neurons.reading import read_text

DATA_VARIABLE = "BAD_NEURONS_DATA"

T = TypeVar("T")


class Wanted(NamedTuple):
    """A public file that a source needs.

    Attributes:
        name: file name.
        folder: its folder below ``BAD_NEURONS_DATA``.
        place: folder or file that was typed behind ``@``, or empty.
    """

    name: str
    folder: str
    place: str

    def find(self) -> Path | None:
        """The file on this machine, or None; looks at ``place`` alone where one is given."""
        root = Path(os.path.expanduser(self.place or os.environ.get(DATA_VARIABLE, "")))
        candidates = [root / self.name, root / self.folder / self.name]
        if self.place:
            candidates.insert(0, root)
        elif not os.environ.get(DATA_VARIABLE):
            return None
        return next((path for path in candidates if path.is_file()), None)

    def or_hub(self, fetch: Callable[[], T]) -> T:
        """What ``fetch`` gets from the Hugging Face hub, for a file that :meth:`find` does not find.

        Raises:
            UserError: a place was typed, or the hub has no answer; the message says what to set.
        """
        if self.place:
            raise self.absent()
        try:
            return fetch()
        except Exception as error:  # no base class is shared by what httpx, huggingface_hub, datasets and pyarrow raise
            raise self.absent(f"the Hugging Face hub did not give it ({type(error).__name__})") from error

    def absent(self, reason: str = "") -> UserError:
        """The error for a file that cannot be had, with what would help."""
        if self.place:
            return UserError(f"{self.place}: no {self.name} here; expected that file or the folder that holds it")
        return UserError(
            f"{self.name}: not on this machine, and {reason}; set {DATA_VARIABLE} to a folder with {self.folder}/{self.name}, "
            "or write its path behind the source (source@path)"
        )


@contextmanager
def blamed_on(path: PathLike, line: int) -> Iterator[None]:
    """Turn a ValueError of the block into a UserError that names file and line."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: line {line}: {error}") from error


def read_csv(path: PathLike, columns: Sequence[str], optional: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """Line number (from 1, where the row begins) and the named columns of every row, without surrounding blanks.

    Columns in ``optional`` may be absent, and their cells empty.

    Raises:
        UserError: unreadable, not UTF-8, no rows, a column or a cell missing, a cell empty, a quote that never closes.
    """
    line = 1
    rows = []
    try:
        with io.StringIO(read_text(path, "a CSV file"), newline="") as handle:
            reader = csv.reader(handle, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in columns if name not in header]:
                raise UserError(f"{path}: line 1: no column `{missing[0]}`; expected a CSV file with the columns {', '.join(columns)}")
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    with blamed_on(path, line):
                        rows.append((line, _named(cells, header, columns, optional)))
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {line}: not CSV ({error}); expected quotes that close and one row for each header") from error
    if not rows:
        raise UserError(f"{path}: no rows; expected a CSV file with the columns {', '.join(columns)}")
    return rows


def _named(cells: list[str], header: list[str], columns: Sequence[str], optional: Sequence[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells; expected {len(header)}: {', '.join(header)}")
    row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    if empty := [name for name in columns if not row[name]]:
        raise ValueError(f"`{empty[0]}` is empty; expected a text")
    return {name: row[name] for name in (*columns, *optional) if name in row}
