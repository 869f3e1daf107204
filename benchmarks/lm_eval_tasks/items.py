"""The published items, read once for both sides: lm-evaluation-harness gets the rows that this package is asked to score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bad_neurons.data.readers import local_path
from bad_neurons.data.records import read_jsonl_rows
from bad_neurons.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("nlp", "poli", "phil")
LETTERS = (" (A)", " (B)")


def read_items(kind: str, items: int = 0) -> list[dict[str, Any]]:
    """Items of ``nlp``, ``poli`` or ``phil`` as published: ``question``, and ``agreeing``, the number of the agreeing letter.

    Args:
        kind: which set.
        items: so many of them at even distances; 0 means all.

    Raises:
        UserError: the set is not on this machine, or an item has other choices than (A) and (B).
    """
    path = local_path(f"anthropic:{kind}")
    if path is None:
        raise UserError("set BAD_NEURONS_DATA to the folder that holds the model-written evaluations (sycophancy_on_*.jsonl)")
    rows = [row for _, row in read_jsonl_rows(path)]
    count = min(items, len(rows)) or len(rows)
    return [_item(kind, rows[i * len(rows) // count]) for i in range(count)]


def _item(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    if row["answer_matching_behavior"] not in LETTERS or "\n (C)" in row["question"]:
        raise UserError(f"{kind}: an item with other choices than (A) and (B): {row['question'][-80:]!r}")
    return {"question": row["question"], "agreeing": LETTERS.index(row["answer_matching_behavior"])}


def dataset(kind: str, items: int = 0, **_: Any) -> dict[str, Dataset]:
    """What ``custom_dataset`` in the task files asks for; ``items`` comes from the task manager's metadata."""
    from datasets import Dataset

    return {"test": Dataset.from_list(read_items(kind, items))}
