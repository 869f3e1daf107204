"""The two tables of a comparison as they come: is everything there, is it what it should be, and does it belong together?

Each fault is one line that names the table and the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bad_neurons.errors import UserError

GROUP = ["method", "examples"]
KEY = [*GROUP, "seed", "strength"]
SCORES = ("before", "after", "odds_before", "odds_after")
FLAGS = ("person_is_right", "accurate_before", "accurate_after")
_ITEM_COLUMNS = (*KEY, "suite", "topic", "id", *SCORES, *FLAGS)
CELL_NUMBERS = (
    *("kl", "perplexity_before", "perplexity_after", "accuracy_before", "accuracy_after"),
    *("neurons", "share", "parameters", "train_seconds"),
)
_CELL_COLUMNS = (*KEY, *CELL_NUMBERS, "trained_on")


def checked_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The table of cells, sorted by its key and numbered from 0; numbers are float64, and KL is not below 0.

    Raises:
        UserError: a column is absent or holds something else, or a row is there twice.
    """
    cells = _with_key(cells, "cells", _CELL_COLUMNS)
    for name in CELL_NUMBERS:
        cells[name] = _numbers(cells, "cells", name)
    kl = cells["kl"]
    if (below := cells[kl < -1e-6]).shape[0]:
        raise UserError(f"cells: column 'kl': {below['kl'].iloc[0]:g} at {_place(below.iloc[0])} is below 0, which no KL divergence is")
    cells["kl"] = kl.clip(lower=0)
    cells["trained_on"] = cells["trained_on"].fillna("").astype(str)
    cells = cells.sort_values(KEY, ignore_index=True)
    _refuse_twice(cells, KEY, "cells")
    for (method, examples), group in cells.groupby(GROUP):
        if group["trained_on"].nunique() > 1:
            several = " and ".join(repr(text) for text in sorted(group["trained_on"].unique()))
            raise UserError(
                f"cells: column 'trained_on': {several} for {method} with {examples} examples; expected the same in all its cells"
            )
    return cells


def checked_items(items: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The table of items, sorted by suite, ``row`` (the number of its cell), topic and id; true, false and empty are 1, 0 and NaN.

    Raises:
        UserError: a column is absent or holds something else, or cells have other items of a suite.
    """
    items = _with_key(items, "items", _ITEM_COLUMNS)
    for name in ("suite", "topic", "id"):
        items[name] = _texts(items, "items", name)
    for name in SCORES:
        items[name] = _numbers(items, "items", name)
    for name in FLAGS:
        items[name] = _flags(items, name)
    items = items.merge(cells[KEY].assign(row=np.arange(len(cells))), on=KEY, how="left")
    if (lost := items[items["row"].isna()]).shape[0]:
        raise UserError(f"items: column 'strength': {_place(lost.iloc[0])} has no row in the table of cells")
    items["row"] = items["row"].astype(np.int64)
    items = items.sort_values(["suite", "row", "topic", "id"], ignore_index=True)
    _refuse_twice(items, ["suite", "row", "id"], "items")
    _refuse_other_items(items)
    return items


def _refuse_other_items(items: pd.DataFrame) -> None:
    """Every cell is measured on the same items of a suite: means of other items would not be comparable."""
    topics = items[["suite", "id", "topic"]].drop_duplicates()
    if (two := topics[topics.duplicated(["suite", "id"])]).shape[0]:
        raise UserError(f"items: column 'topic': item {two['id'].iloc[0]} of suite {two['suite'].iloc[0]} is of two topics; expected one")
    everything = topics["suite"].value_counts()
    counts = items.groupby(["suite", "row"])["id"].size()
    for (suite, row), count in counts[counts < counts.index.get_level_values("suite").map(everything)].items():
        raise UserError(
            f"items: column 'id': {_place(items[items['row'] == row].iloc[0])} has {count} of the {everything[suite]} items of suite "
            f"{suite}; measure all cells on the same items"
        )


def _with_key(frame: pd.DataFrame, what: str, columns: Sequence[str]) -> pd.DataFrame:
    if absent := [name for name in columns if name not in frame.columns]:
        raise UserError(f"{what}: no column {absent[0]!r}; the table needs {', '.join(columns)}")
    if not len(frame):
        raise UserError(f"{what}: column 'method': the table has no rows; run at least one cell")
    frame = frame.reset_index(drop=True)
    frame["method"] = _texts(frame, what, "method")
    for name in KEY[1:]:
        values = _numbers(frame, what, name)
        if (wrong := values[~np.isfinite(values) | (values < 0)]).size:
            raise UserError(f"{what}: column {name!r}: {wrong.iloc[0]} in row {wrong.index[0]}; expected a number of at least 0")
        if name != "strength" and (broken := values[values % 1 != 0]).size:
            raise UserError(f"{what}: column {name!r}: {broken.iloc[0]} in row {broken.index[0]}; expected a whole number")
        frame[name] = values if name == "strength" else values.astype(np.int64)
    return frame


def _texts(frame: pd.DataFrame, what: str, name: str) -> pd.Series[Any]:
    if (empty := frame.index[frame[name].isna() | (frame[name].astype(str) == "")]).size:
        raise UserError(f"{what}: column {name!r}: empty in row {empty[0]}; expected a text")
    return frame[name].astype(str)


def _numbers(frame: pd.DataFrame, what: str, name: str) -> pd.Series[Any]:
    values = pd.to_numeric(frame[name], errors="coerce").astype(np.float64)
    if (wrong := frame.index[values.isna() & frame[name].notna()]).size:
        raise UserError(f"{what}: column {name!r}: {frame[name][wrong[0]]!r} in row {wrong[0]} is not a number")
    return values


def _flags(frame: pd.DataFrame, name: str) -> pd.Series[Any]:
    """True, False and empty as 1, 0 and NaN."""
    try:
        return frame[name].astype("boolean").astype("Float64").astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"items: column {name!r}: expected true, false or empty ({error})") from error


def _refuse_twice(frame: pd.DataFrame, key: list[str], what: str) -> None:
    if (twice := frame[frame.duplicated(key)]).shape[0]:
        item = f", item {twice['id'].iloc[0]} of suite {twice['suite'].iloc[0]}" if "id" in key else ""
        raise UserError(f"{what}: column {key[-1]!r}: {_place(twice.iloc[0])}{item} is there twice")


def _place(row: Any) -> str:
    return f"{row['method']}, {row['examples']} examples, seed {row['seed']}, strength {row['strength']:g}"
