"""The results of judges as a table for the terminal, and their agreement as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from bad_neurons.evaluation.judged.tests import TESTS, TestName

MEDIAN, OTHERS = "published median", "median of the other two"
TITLES: dict[tuple[TestName, str], str] = {
    ("pickside", "number"): "Picking sides: score for the person, sum of both orders (-10 to 10)",
    ("mirror", "number"): "Mirroring: distance between both stances (0 to 10)",
    ("mirror", "signed"): "Mirroring: move towards the person's stance (-10 to 10)",
    ("whosaid", "number"): "Attribution: agreement with the person minus with a stranger (-10 to 10)",
    ("delusion", "number"): "Delusion: going along with it (0 to 5)",
}
_ABSENT = "-"


def judged_table(results: Mapping[str, Any]) -> Table:
    """The tests' numbers before and after with 95 % intervals, and how they changed.

    Args:
        results: the content of ``results.json`` of ``bad-neurons judge``.
    """
    after = any("after" in sides for sides in results["tests"].values())
    table = Table(caption=f"Judged by {', '.join(results['judges'])}. Intervals are 95 %, over questions.")
    table.add_column("Test")
    for name in ("Before", "After", "Change", "Answers with a score") if after else ("Before", "Answers with a score"):
        table.add_column(name, justify="right")
    for test, sides in results["tests"].items():
        for number in TESTS[test].numbers:
            values = [_interval(side[number], "mean") for side in sides.values()]
            valid = min(side["valid"] for name, side in sides.items() if name != "change")
            table.add_row(TITLES[test, number], *values, f"{100 * valid:.0f} %")
    return table


def agreement_markdown(results: Mapping[str, Any]) -> str:
    """A table a test: each judge against the published median, the published judges against each other, and a fixed score.

    Args:
        results: the content of ``agreement.json``.
    """
    return "\n".join(line for test, found in results["tests"].items() for line in _section(test, found))


def _section(test: TestName, found: Mapping[str, Any]) -> Iterator[str]:
    scale = f"scale {TESTS[test].low} to {TESTS[test].high}"
    yield f"## {test}: {found['answers']} answers of {found['models']} models to {found['questions']} questions, {scale}"
    yield ""
    yield "| judge | against | answers | Spearman | mean absolute error | bias |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, against in found["judges"].items():
        yield _row(name, MEDIAN, against[MEDIAN])
    for name, against in found["ceiling"].items():
        yield _row(name, OTHERS, against[OTHERS])
    floor = found["floor"]
    yield f"| always {floor['score']:g} | {MEDIAN} | {found['answers']} | {_ABSENT} | {_interval(floor['mae'], 'mean')} | {_ABSENT} |"
    yield ""


def _row(name: str, other: str, found: Mapping[str, Any] | None) -> str:
    cells = [name, other, str(found["n"] if found else 0)]
    for key, value in (("spearman", "value"), ("mae", "mean"), ("bias", "mean")):
        cells.append(_interval(found[key] if found else None, value))
    return f"| {' | '.join(cells)} |"


def _interval(found: Mapping[str, Any] | None, value: str) -> str:
    return _ABSENT if found is None else f"{found[value]:.2f} [{found['ci95'][0]:.2f}, {found['ci95'][1]:.2f}]"
