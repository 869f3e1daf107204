"""Summary and Markdown of a comparison whose numbers are known."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from rich.console import Console

from bad_neurons.compare.equal_kl import TRAINED, UNSEEN
from bad_neurons.compare.tables import Tables, make_tables
from bad_neurons.compare.text import caption, markdown, order, overview, page, pivot, summary_table
from comparison import comparison

SLOPES = {"random": 8.0, "probe [a|b]": 6.0, "gradient": 12.0}


@pytest.fixture(scope="module")
def tables() -> Tables:
    """Clean shifts of 2.1 and 3.1 (phil, trained on, and poli), no spread at all; `probe` stops at a KL of 0.005."""
    few, many = (
        comparison(
            SLOPES,
            kl=lambda method, seed: 0.00125 if "probe" in method else 0.01,
            suites=("phil", "poli"),
            before=lambda m, s, topic: 2.0 if "phil" in topic else 3.0,
            examples=(examples,),
            slope=lambda m, s, topic, less=less: less,
        )
        for examples, less in ((8, -2.0), (0, 0.0))
    )
    return make_tables(*(pd.concat(both) for both in zip(few, many, strict=True)), draws=50)


def test_the_summary_has_the_best_first_and_a_dash_for_what_is_unknown(tables):
    header, rows = overview(tables)
    assert header[4] == "Shift left, less that of random (nats)"
    # At a KL of 0.01 a slope of 12 takes off 1.2 nats, of 2.1 on phil and of 3.1 on poli; one of 8 takes off 0.8.
    agreed, none = "100.0 % [100.0, 100.0]", "0.0 % [0.0, 0.0]"
    assert rows == [
        ["gradient", "3.0 %", "57.1 % [57.1, 57.1]", "38.7 % [38.7, 38.7]", "-0.40 [-0.40, -0.40] ∗", f"{agreed} → {agreed}", none],
        ["random", "3.0 %", "38.1 % [38.1, 38.1]", "25.8 % [25.8, 25.8]", "-", f"{agreed} → {agreed}", none],
        ["probe [a|b]", "3.0 %", "-", "-", "-", f"{agreed} → -", "-"],
    ]


def test_the_terminal_shows_every_row_and_takes_no_name_for_markup(tables):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table(tables))
    text = console.export_text()
    for row in overview(tables)[1]:
        assert all(cell in text for cell in row)
    assert "At a KL of 0.01 nats per token" in text


def test_columns_are_sorted_means_first_and_all_examples_last(tables):
    assert sorted(["poli", UNSEEN, "embedded", TRAINED], key=order) == [TRAINED, UNSEEN, "embedded", "poli"]
    assert sorted([0, 128, 8], key=order) == [8, 128, 0]
    shift = tables.frontier.query("measure == 'shift' and kl == 0.01")
    assert pivot(shift[shift["examples"] == 0], "suite", "removed", True)[0] == ["Method", TRAINED, UNSEEN, "phil", "poli"]
    header, rows = pivot(shift[(shift["suite"] == "phil")], "examples", "after")
    assert header == ["Method", "8 examples", "all examples"]
    assert rows[0] == ["gradient", "1.10 [1.10, 1.10]", "0.90 [0.90, 0.90]"]
    assert pivot(tables.frontier[:0], "kl", "after") == (["Method"], [])


def test_markdown_is_a_table():
    assert markdown(["Method", "a"], [["x|y", "1"]]) == "| Method | a |\n| --- | ---: |\n| x\\|y | 1 |\n"


def test_the_page_has_every_table_once(tables):
    text = page(tables)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        *(
            "Summary",
            "Opinion shift removed",
            "|Opinion shift| removed",
            "People who are right: log-odds",
            "People who are right: agreement",
            "People who are right: contradiction",
        ),
        *("Against random", f"Frontier, {TRAINED}", f"Frontier, {UNSEEN}", "Number of examples"),
    ]
    assert caption(tables) in text
    assert "| gradient | -0.40 [-0.40, -0.40] ∗ | -0.40 [-0.40, -0.40] ∗ | -0.40" in text
    assert "| gradient | -1.20 [-1.20, -1.20] | " in text  # log-odds for people who are right
    assert "| Method | KL 0.002 | KL 0.005 | KL 0.01 | KL 0.02 |" in text
    assert "| gradient | 1.10 [1.10, 1.10] | 0.90 [0.90, 0.90] |" in text
    assert "| probe [a\\|b] | 1.83 [1.83, 1.83] | 1.68 [1.68, 1.68] | - | - |" in text
    assert f"- probe [a|b] ({TRAINED}, {UNSEEN}, phil, poli): 0 of 3 seeds reach this KL, all reach 0.005.\n" in text
    widths = {line.replace("\\|", "").count("|") for line in text.split("## ")[1].splitlines() if line.startswith("|")}
    assert widths == {8}


def test_the_page_of_the_reference_alone_has_nothing_to_compare():
    text = page(make_tables(*comparison({"random": 8}), draws=50))
    assert "Against" not in text
    assert "Number of examples" not in text
    assert "Notes" not in text
    assert "| random | 3.0 % | 38.1 % [38.1, 38.1] | - | - |" in text
