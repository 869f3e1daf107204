"""The numbers of a comparison for a reader: a summary in the terminal, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from bad_neurons.compare.equal_kl import TRAINED, UNSEEN
from bad_neurons.compare.measured import MEASURES
from bad_neurons.compare.tables import Tables, examples_order, examples_text
from bad_neurons.report.terminal import ABSENT, estimate_text, percent_text

_SIGN = "\N{ASTERISK OPERATOR}"  # behind a difference whose interval excludes 0; Markdown leaves it alone


Part = tuple[str, str, tuple[list[str], list[list[str]]]]  # title, text, header and rows
_AT_BOUND = (
    ("shift", "removed", "Opinion shift removed", "Share of the mean opinion shift that is removed, {}; above 100 %, it points away."),
    (
        *("abs_shift", "removed", "|Opinion shift| removed"),
        "Share of the mean of |opinion shift| that is removed, {}; an item that is pulled away from the person counts like one that is "
        "pulled towards them.",
    ),
    ("odds_right", "change", "People who are right: log-odds", "Change of the log-odds of agreeing with them, in nats, {}."),
    ("agree_right", "after", "People who are right: agreement", "Share of them that the model agrees with, {}."),
    (
        *("contradict_right", "after", "People who are right: contradiction"),
        "Share of them that the model contradicts although it says the same where nobody has said anything, {}. Agreement that falls "
        "without this is a model that goes by what it knows.",
    ),
)


def order(name: Any) -> tuple[int, float, str]:
    """What columns and panels are sorted by: means of suites, then suites by name; numbers by size, all examples last."""
    if isinstance(name, str):
        return [TRAINED, UNSEEN, name].index(name), 0.0, name
    return 0, examples_order(name), ""


def main_rows(table: pd.DataFrame, tables: Tables, **where: object) -> pd.DataFrame:
    """Rows of each method's largest number of examples, and of the values that are asked for."""
    chosen = table["examples"] == table["method"].map(tables.largest)
    for column, value in where.items():
        chosen &= table[column] == value
    return table[chosen]


def number(row: pd.Series[Any], name: str, share: bool = False) -> str:
    """``0.42 [0.31, 0.55]`` or, for a share, ``42.0 % [31.0, 55.0]``; a dash where there is no number."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if not np.isfinite(value):
        return ABSENT
    interval = [low, high] if np.isfinite(low) else None
    text = estimate_text({"mean": value, "ci95": interval}, share)
    return f"{text} {_SIGN}" if excludes_zero(row) else text


def excludes_zero(row: pd.Series[Any]) -> bool:
    """Whether the interval of a difference is known to exclude 0."""
    known = row.get("excludes_zero", pd.NA)
    return known is not pd.NA and bool(known)


def overview(tables: Tables) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary at the KL bound, the method that leaves least first.

    Args:
        tables: of the comparison.
    """
    header = [
        *("Method", "Neurons", "Removed, trained suites", "Removed, unseen suites"),
        f"Shift left, less that of {tables.reference} (nats)",
        *("Agreement with people who are right", "They are contradicted"),
    ]
    shift = main_rows(tables.frontier, tables, measure="shift", kl=tables.bound)
    right, against = (
        main_rows(tables.frontier, tables, measure=measure, kl=tables.bound, suite=TRAINED)
        for measure in ("agree_right", "contradict_right")
    )
    less = main_rows(tables.differences, tables, measure="shift", kl=tables.bound, suite=TRAINED) if len(tables.differences) else shift[:0]
    trained = shift[shift["suite"] == TRAINED].set_index("method")["removed"]
    shares = main_rows(tables.results, tables).groupby("method")["share"].first()
    rows = [
        [
            method,
            percent_text(shares[method]) if np.isfinite(shares[method]) else ABSENT,
            *(_of(shift[shift["suite"] == suite], method, "removed", True) for suite in (TRAINED, UNSEEN)),
            _of(less, method, "difference"),
            _of(right, method, "before", True) + " → " + _of(right, method, "after", True),
            _of(against, method, "after", True),
        ]
        for method in sorted(tables.largest, key=lambda method: (-np.nan_to_num(trained.get(method, np.nan), nan=-np.inf), method))
    ]
    return header, rows


def _of(rows: pd.DataFrame, method: str, name: str, share: bool = False) -> str:
    mine = rows[rows["method"] == method]
    return number(mine.iloc[0], name, share) if len(mine) else ABSENT


def caption(tables: Tables) -> str:
    """What the numbers of the summary are."""
    return (
        f"At a KL of {tables.bound:g} nats per token on unrelated text, between the strengths that were measured. Mean [95 % interval over "
        f"topics and seeds]; {_SIGN} the interval excludes 0; {ABSENT} not every seed reaches this KL, or nothing was measured."
    )


def summary_table(tables: Tables) -> Table:
    """The summary for the terminal.

    Args:
        tables: of the comparison.
    """
    header, rows = overview(tables)
    table = Table(caption=caption(tables))
    for name in header:
        table.add_column(escape(name), justify="left" if name == "Method" else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row), style="bold" if row[0] == tables.reference else None)
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; its first column is text and the others numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def pivot(table: pd.DataFrame, columns: str, name: str, share: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with a row for each method and a column for each suite, KL level or number of examples.

    Args:
        table: rows of a table of the comparison, one for each method and value of ``columns``.
        columns: the column whose values become columns.
        name: the number to show, with its interval.
        share: whether it is a share.
    """
    texts: dict[str, Callable[[Any], str]] = {"kl": lambda kl: f"KL {kl:g}", "examples": lambda n: f"{examples_text(n)} examples"}
    values = sorted(table[columns].unique(), key=order)
    header = ["Method", *(texts.get(columns, str)(value) for value in values)]
    by_value = [table[table[columns] == value] for value in values]
    return header, [[method, *(_of(rows, method, name, share) for rows in by_value)] for method in sorted(table["method"].unique())]


def page(tables: Tables) -> str:
    """Every table of a comparison, with what has to be said of single numbers, as Markdown.

    Args:
        tables: of the comparison.
    """
    bound = f"at a KL of {tables.bound:g} nats per token"
    at_bound = main_rows(tables.frontier, tables, kl=tables.bound)
    shift = at_bound[at_bound["measure"] == "shift"]
    parts: list[Part] = [("Summary", caption(tables), overview(tables))]
    for measure, name, title, what in _AT_BOUND:
        rows = at_bound[at_bound["measure"] == measure]
        share = name == "removed" or MEASURES[measure].share
        parts.append((title, what.format(bound), pivot(rows, "suite", name, share)))
    less = at_bound[:0]
    if len(tables.differences):
        less = main_rows(tables.differences, tables, measure="shift", kl=tables.bound)
        what = f"Opinion shift left, less that of {tables.reference}, in nats, {bound}; {_SIGN} the interval excludes 0."
        parts.append((f"Against {tables.reference}", what, pivot(less, "suite", "difference")))
    for suite in (TRAINED, UNSEEN):
        rows = main_rows(tables.frontier, tables, measure="shift", suite=suite)
        parts.append((f"Frontier, {suite}", "Mean opinion shift left, in nats, by KL.", pivot(rows, "kl", "after")))
    if tables.frontier["examples"].nunique() > 1:
        rows = tables.frontier.query("measure == 'shift' and kl == @tables.bound and suite == @TRAINED")
        parts.append(
            ("Number of examples", f"Mean opinion shift left on trained suites, in nats, {bound}.", pivot(rows, "examples", "after"))
        )
    body = "\n".join(f"## {title}\n\n{text}\n\n{markdown(*table)}" for title, text, table in parts if table[1])
    return body + _notes(pd.concat([shift, less]))


def _notes(rows: pd.DataFrame) -> str:
    """What is said of single numbers, once for each method, with the suites that it is said of."""
    by_note = rows[rows["note"] != ""].drop_duplicates(["method", "note", "suite"]).groupby(["method", "note"])["suite"]
    lines = [f"- {method} ({', '.join(sorted(suites, key=order))}): {note}.\n" for (method, note), suites in by_note]
    return "\nNotes:\n\n" + "".join(lines) if lines else ""
