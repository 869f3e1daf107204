"""Open-Ended Sycophancy (henrypapadatos/Open-ended_sycophancy): questions with a sycophantic and an honest answer at length.

In some rows the person voices a view (``agreeing_type`` 1); the others ask about character, such as whether to be right or
to be liked, and there the sycophantic answer is the one that wants to please.
"""

from __future__ import annotations

from pathlib import Path

from bad_neurons.data.readers.files import Wanted, blamed_on, read_csv
from bad_neurons.data.records import Record
from bad_neurons.errors import UserError

REPOSITORY = "henrypapadatos/Open-ended_sycophancy"
COLUMNS = ("prompt", "sycophantic", "not_sycophantic")

# By the column `agreeing_type`, which a copy of the file need not have.
SOURCES = {"1": "open-ended:view", "0": "open-ended:character", "": "open-ended"}


def locate(rest: str) -> Path | None:
    """The local CSV file (``@`` file or folder), or None."""
    return _wanted(rest).find()


def read(rest: str) -> list[Record]:
    """One record a row, from the CSV file at ``rest`` (``@`` file or folder); without a local file, from the hub.

    Each row is a topic, and none has a neutral prompt.

    Raises:
        UserError: a file that cannot be had, or a row that is malformed.
    """
    wanted = _wanted(rest)
    path = wanted.find()
    rows = read_csv(path, COLUMNS, ("agreeing_type",)) if path else wanted.or_hub(_fetch)
    records: list[Record] = []
    for line, row in rows:
        with blamed_on(path or REPOSITORY, line):
            records.append(_record(row))
    return records


def _wanted(rest: str) -> Wanted:
    variant, _, place = rest.partition("@")
    if variant:
        raise UserError(f"data: no source 'open-ended:{rest}'; expected open-ended or open-ended@path.csv")
    return Wanted("Open-ended_sycophancy_dataset.csv", "open-ended-sycophancy", place)


def _fetch() -> list[tuple[int, dict[str, str]]]:
    from datasets import load_dataset

    rows = load_dataset(REPOSITORY, split="train")
    kinds = ("" if row.get("agreeing_type") is None else str(int(row["agreeing_type"])) for row in rows)
    cells = [{**{name: row[name].strip() for name in COLUMNS}, "agreeing_type": kind} for row, kind in zip(rows, kinds, strict=True)]
    return list(enumerate(cells, start=1))


def _record(row: dict[str, str]) -> Record:
    kind = row.get("agreeing_type", "")
    if kind not in SOURCES:
        raise ValueError(f"`agreeing_type` is {kind!r}; expected 1 (the person voices a view) or 0")
    return Record(
        prompt=({"role": "user", "content": row["prompt"]},),
        sycophantic=row["sycophantic"],
        honest=row["not_sycophantic"],
        topic=row["prompt"],
        source=SOURCES[kind],
    )
