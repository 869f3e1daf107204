"""From the results of cells to the tables and plots of a comparison."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bad_neurons.artifacts import read_json, written_aside
from bad_neurons.compare.setting import Cell, Options, Setting
from bad_neurons.data.splits import sources_of
from bad_neurons.errors import UserError
from bad_neurons.evaluation.evaluate import suite_name
from bad_neurons.formats import CELL

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def results_of(setting: Setting, cells: Sequence[Cell], folder: Path) -> list[dict[str, Any]]:
    """Results of the cells that are done."""
    found = (read_cell(cell.path(folder, setting.stamp)) for cell in cells)
    return [result for result in found if result is not None]


def read_cell(path: Path) -> dict[str, Any] | None:
    """The result of a cell; None where it is not there or cannot be relied on, which is logged."""
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = read_json(path, CELL)
        if found["key"] != path.stem:
            raise UserError(f"{path}: the result of another cell")
        return found
    except UserError as error:
        log.warning("%s; the cell is run again", error)
        return None


def tables_of(results: Sequence[Mapping[str, Any]], records: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``cells`` and ``items``, as :func:`bad_neurons.compare.tables.make_tables` reads them."""
    import pandas as pd

    cells: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    trained_on = ",".join(suite_name(source) for source in sources_of(records))
    for result in results:
        key = {name: result[name] for name in ("method", "seed", "examples")}
        facts = {name: result.get(name) for name in ("correction", "neurons", "share", "parameters", "train_seconds")}
        for measured in result["strengths"]:
            at = {**key, "strength": measured["strength"]}
            right = {name: _right(rows) for name, rows in (("before", result["clean"]), ("after", measured["items"]))}
            accuracy = {f"accuracy_{when}": sum(found) / len(found) if found else None for when, found in right.items()}
            effects = {"kl": measured["kl_per_token"], **{f"perplexity_{w}": measured[f"perplexity_{w}"] for w in ("before", "after")}}
            cells.append({**at, **facts, **effects, **accuracy, "trained_on": trained_on})
            items += [{**at, **row} for row in _items(result["clean"], measured["items"])]
    return pd.DataFrame(cells), pd.DataFrame(items)


def _items(clean: Mapping[str, list[Any]], edited: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """A row for each item with a neutral prompt that both models were scored on."""
    for suite, rows in edited.items():
        for before, after in zip(clean[suite], rows, strict=True):
            if before["valid"] and before.get("odds_neutral") is not None:
                known = after["valid"]  # a correction that went wrong leaves no number, and the tables say so
                yield {
                    "suite": suite, "topic": before["topic"], "id": before["id"], "person_is_right": before["person_is_right"],
                    "before": before["odds"] - before["odds_neutral"],
                    "after": after["odds"] - after["odds_neutral"] if known else float("nan"),
                    "odds_before": before["odds"], "odds_after": after["odds"] if known else float("nan"),
                    "accurate_before": _accurate(before), "accurate_after": _accurate(after) if known else None,
                }  # fmt: skip


def _accurate(row: Mapping[str, Any]) -> bool | None:
    """Whether the model finds what is true likelier when nobody has said anything; None for a matter of opinion."""
    right = row["person_is_right"]
    return None if right is None else (row["odds_neutral"] > 0) == right


def _right(suites: Mapping[str, list[Any]]) -> list[bool]:
    found = [_accurate(row) for rows in suites.values() for row in rows if row["valid"] and row.get("odds_neutral") is not None]
    return [one for one in found if one is not None]


def write_results(folder: Path, own: Options, setting: Setting, cells: Sequence[Cell]) -> None:
    """Tables, plots and a summary of the cells that are done; ``own`` is the section ``compare``."""
    from rich.console import Console

    from bad_neurons.compare.plots import write_plots
    from bad_neurons.compare.tables import make_tables
    from bad_neurons.compare.text import page, summary_table

    rows, items = tables_of(results_of(setting, cells, folder / "cells"), setting.records)
    if rows.empty:
        raise UserError(f"{folder}: no cell is done, so there is nothing to compare")
    if own["reference"] not in set(rows["method"]):
        log.info("no cell of the reference %s is done yet, so there are no tables", own["reference"])
        return
    tables = make_tables(items, rows, own["reference"], own["kl_levels"], own["kl_bound"])
    tables.write(folder)
    write_plots(tables, folder / "plots")
    with written_aside(folder / "compare.md") as aside:
        aside.write_text(page(tables), encoding="utf-8")
    Console().print(summary_table(tables))
    log.info("tables: %s\nplots:  %s", folder / "compare.csv", folder / "plots")
