"""``bad-neurons judge-agreement``: how well judges agree with the published ones, on the published answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bad_neurons.artifacts import write_json, written_aside
from bad_neurons.data.tuning import draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.agreement import Agreement, agreement, fixed_score
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.panel import Panel
from bad_neurons.evaluation.judged.published import JUDGES, PublishedAnswer, read_published
from bad_neurons.evaluation.judged.tables import MEDIAN, OTHERS, agreement_markdown
from bad_neurons.evaluation.judged.tests import TestName, median_score
from bad_neurons.formats import AGREEMENT

PUBLISHED = [f"published judge {number}" for number in range(1, JUDGES + 1)]


def judge_agreement(
    tests: list[TestName] = ["pickside", "mirror", "whosaid", "delusion"],  # noqa: B006 (read only)
    judged: str = "",
    max_answers: int = 0,
    seed: int = 0,
    out: str = "runs/judge-agreement",
    **panel: Any,
) -> dict[str, Any]:
    """Let judges score the published answers, compare with the published scores, and write ``agreement.json`` and ``agreement.md``.

    Args:
        tests: which of the four tests.
        judged: folder of the published ``<test>.csv``; empty means ``syco-bench/judged`` below ``BAD_NEURONS_DATA``.
        max_answers: at most so many answers of a test, drawn evenly over its questions; 0 means all.
        seed: seed of that draw and of the intervals.
        out: folder for the results and for what is kept for the next time.
        **panel: the judges, see :class:`bad_neurons.evaluation.judged.panel.Panel`.

    Raises:
        UserError: published answers that cannot be read, or a judge that cannot be had.
    """
    judges = Panel(**panel)
    if max_answers < 0 or not tests:
        raise UserError(f"--max_answers {max_answers}, --tests {tests}: at least 0 and one test")
    answers = [a for test in dict.fromkeys(tests) for a in draw_evenly(read_published(test, judged), max_answers, seed)]
    scores = judges.scores([a.item.asked_of_judge(a.answer) for a in answers], Kept(Path(out) / "verdicts.jsonl"))
    results: dict[str, Any] = {"format": AGREEMENT, "max_answers": max_answers, "seed": seed, "tests": {}}
    for test in dict.fromkeys(tests):
        places = [number for number, answer in enumerate(answers) if answer.item.test == test]
        of_test = {name: [given[number] for number in places] for name, given in scores.items()}
        results["tests"][test] = compare([answers[number] for number in places], of_test, seed)
    write_json(Path(out) / "agreement.json", results)
    with written_aside(Path(out) / "agreement.md") as aside:
        aside.write_text(agreement_markdown(results), encoding="utf-8")
    return results


def compare(answers: Sequence[PublishedAnswer], scores: Mapping[str, Sequence[float | None]], seed: int = 0) -> dict[str, Any]:
    """Agreement of each judge with the published ones on the answers to one test.

    ``judges`` (several of them also by their median) are compared with the published median and with each published judge;
    ``ceiling`` compares each published judge with the others, with the median of the other two, and with the median that it is
    part of; ``floor`` is the fixed score that comes nearest to the median.

    Args:
        answers: the answers.
        scores: what each judge gave them.
        seed: seed of the intervals.
    """
    topics = [answer.topic for answer in answers]
    median: list[float | None] = [answer.median for answer in answers]
    published = {name: [answer.scores[number] for answer in answers] for number, name in enumerate(PUBLISHED)}
    ours = dict(scores)
    if len(ours) > 1:
        ours["median of these judges"] = [median_score(row) for row in zip(*scores.values(), strict=True)]

    def against(given: Sequence[float | None], others: Mapping[str, Sequence[float | None]]) -> dict[str, Agreement | None]:
        return {name: agreement(given, other, topics, seed) for name, other in others.items()}

    ceiling = {}
    for name, given in published.items():
        rest = {other: theirs for other, theirs in published.items() if other != name}
        of_rest = [median_score(row) for row in zip(*rest.values(), strict=True)]
        ceiling[name] = against(given, {OTHERS: of_rest, MEDIAN: median, **rest})
    return {
        "answers": len(answers),
        "questions": len(set(topics)),
        "models": len({answer.model for answer in answers}),
        "judges": {name: against(given, {MEDIAN: median, **published}) for name, given in ours.items()},
        "ceiling": ceiling,
        "floor": fixed_score(median, topics),
    }
