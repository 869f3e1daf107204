"""The numbers of a run as text, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

ABSENT = "-"


class Measure(NamedTuple):
    """One measure of a suite.

    Attributes:
        key: its name in ``results.json``.
        title: its name for a reader.
        percent: True for a share, False for nats.
        meaning: one sentence for a reader who does not know it.
    """

    key: str
    title: str
    percent: bool
    meaning: str


MEASURES = (
    Measure(
        "opinion_shift",
        "Opinion shift (nats)",
        False,
        "Log-odds of the answer that agrees with the person, minus the same with the person's opinion taken out of the prompt; "
        "0 means that the opinion has no pull, and above 0 it pulls the model towards the person.",
    ),
    Measure(
        "match_rate_per_token",
        "Agreement by text, per token",
        True,
        "Share of items where the tokens of the sycophantic answer are the likelier ones on average; answers of several sentences are "
        "compared so, because their sum favours the shorter one whatever it says.",
    ),
    Measure(
        "odds_per_token",
        "Log-odds per token (nats)",
        False,
        "Mean log-probability of a token of the sycophantic answer, minus that of the honest one.",
    ),
    Measure("match_rate", "Agreement by text", True, "Share of items where the words of the agreeing answer are the likelier ones."),
    Measure(
        "match_rate_letter",
        "Agreement by letter",
        True,
        "Share of items where the letter of the agreeing answer is the likelier one; the answers are listed as (A) and (B) in both orders.",
    ),
    Measure(
        "letter_bias",
        "Letter bias (nats)",
        False,
        "Log-odds of (A) over (B) whatever they stand for; far from 0, the model chooses letters by habit, "
        "and agreement by letter says little.",
    ),
    Measure(
        "accuracy",
        "Accuracy without a belief",
        True,
        "Share of questions of fact where the words of the true position are the likelier ones, and nobody has said what they believe.",
    ),
    Measure("accuracy_wrong", "Accuracy, person wrong", True, "The same, asked by a person who believes the wrong answer."),
    Measure("accuracy_right", "Accuracy, person right", True, "The same, asked by a person who believes the true answer."),
    Measure(
        "drop_wrong",
        "Accuracy lost, person wrong",
        True,
        "Accuracy without the belief minus accuracy under it, over the same questions; 0 means that a wrong belief takes nothing away.",
    ),
    Measure(
        "drop_right",
        "Accuracy lost, person right",
        True,
        "The same for a right belief; below 0 it helps the model, above 0 the model contradicts people who are right.",
    ),
    Measure(
        "contradiction",
        "Contradicts a right person",
        True,
        "Of the questions that are answered rightly without a belief, the share that is answered wrongly when the person is right.",
    ),
)


def results_table(results: Mapping[str, Any]) -> Table:
    """Suites and measures before and after with 95 % intervals, and the side effects below them.

    Args:
        results: the content of ``results.json``.
    """
    table = Table(caption="Mean [95 % interval over topics]")
    for name in ("Measure", "Before", "After"):
        table.add_column(name, justify="left" if name == "Measure" else "right")
    for suite, sides in (results.get("suites") or {}).items():
        table.add_row(f"[bold]{escape(suite)}[/bold]")
        for measure, before, after in suite_rows(sides):
            table.add_row(measure.title, *(estimate_text(value, measure.percent) for value in (before, after)))
        table.add_section()
    if effects := list(side_effect_rows(results.get("side_effects") or {})):
        table.add_row("[bold]side effects[/bold]")
        for title, clean, tuned in effects:
            table.add_row(title, clean, tuned)
    return table


def suite_rows(sides: Mapping[str, Any]) -> Iterator[tuple[Measure, Any, Any]]:
    """Each measure of a suite (or of one kind of person) with its estimate before and after; measures that have neither are left out."""
    before, after = sides.get("before") or {}, sides.get("after") or {}
    for measure in MEASURES:
        if before.get(measure.key) or after.get(measure.key):
            yield measure, before.get(measure.key), after.get(measure.key)


def side_effect_rows(effects: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Title, text before and text after of each side effect that was measured."""
    if before := effects.get("accuracy_before"):
        title = f"Accuracy, {before['n']:,} questions"
        yield title, estimate_text(before, percent=True), estimate_text(effects.get("accuracy_after"), percent=True)
    if change := effects.get("accuracy_change"):
        yield "Change of accuracy", ABSENT, estimate_text(change, percent=True)
    if "kl_per_token" in effects:
        yield "KL to clean model (nats/token)", ABSENT, small_text(effects["kl_per_token"])
    if "perplexity_before" in effects:
        yield "Perplexity, unrelated text", number_text(effects["perplexity_before"]), number_text(effects.get("perplexity_after"))


def estimate_text(estimate: Any, percent: bool = False) -> str:
    """``2.31 [2.02, 2.60]``, or ``64.2 % [58.0, 70.1]`` for a share; a dash where there is no estimate."""
    if not estimate:
        return ABSENT
    interval = estimate.get("ci95")
    return mean_text(estimate, percent) + (f" {interval_text(interval, percent)}" if interval else "")


def mean_text(estimate: Any, percent: bool = False) -> str:
    """The mean of an estimate alone."""
    if not estimate:
        return ABSENT
    return percent_text(estimate["mean"]) if percent else number_text(estimate["mean"])


def interval_text(interval: Any, percent: bool = False) -> str:
    """``[2.02, 2.60]``, or ``[58.0, 70.1]`` for a share."""
    low, high = interval
    return f"[{100 * low:z.1f}, {100 * high:z.1f}]" if percent else f"[{number_text(low)}, {number_text(high)}]"


def number_text(value: float | None) -> str:
    """Two decimals and thousands set apart, without a negative zero."""
    return f"{value:z,.2f}" if value is not None else ABSENT


def percent_text(value: float | None) -> str:
    """A share with one decimal and its unit."""
    return f"{100 * value:z.1f} %" if value is not None else ABSENT


def small_text(value: float | None) -> str:
    """Two significant digits, for numbers that may be tiny."""
    return f"{value:#.2g}" if value is not None else ABSENT
