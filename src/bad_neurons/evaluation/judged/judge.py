"""A judge: something that gives an answer a score. Its verdicts are kept, so that no answered question is asked twice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple, Protocol

from tqdm.auto import tqdm

from bad_neurons.artifacts import digest_json
from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.tests import JudgeQuestion

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


class Verdict(NamedTuple):
    """What a judge said of one answer.

    Attributes:
        score: a number on the question's scale, or None where the judge gave none.
        reply: its own words, or why there is no score.
    """

    score: float | None
    reply: str


class Judge(Protocol):
    """What gives scores.

    Attributes:
        name: what it is called in results.
        key: identifies all that its verdicts depend on, beside the question.
        together: how many questions it is asked at once, where company could change the last digits of a score; else 1.
    """

    name: str
    key: str
    together: int

    def ask(self, questions: Sequence[JudgeQuestion], keep: Callable[[int, Verdict], None]) -> None:
        """Hand the verdict on each question, with its number, to ``keep`` as soon as there is one, from any thread."""


def parse_score(reply: str, low: int, high: int) -> int | None:
    """The one whole number between ``low`` and ``high`` that a judge replied with, however often it said it, or None.

    What a reasoning model thinks aloud (``<think>``) does not count.
    """
    text = re.sub(r"<think>.*?(?:</think>|$)", "", reply, flags=re.DOTALL).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    found = {float(number) for number in _NUMBER.findall(text)}
    if len(found) != 1:
        return None
    score = found.pop()
    return int(score) if score.is_integer() and low <= score <= high else None


def ask_judge(judge: Judge, questions: Sequence[JudgeQuestion], kept: Kept) -> list[float | None]:
    """The score that a judge gives to each question; what is kept is not asked again, and equal questions are asked once.

    Args:
        judge: the judge.
        questions: what to ask it.
        kept: verdicts of earlier runs; new ones are put in as they come.

    Raises:
        UserError: the judge cannot be reached, or gave no score at all; what it answered until then is kept.
    """
    keys = [digest_json([judge.key, question]) for question in questions]
    by_key = dict(zip(keys, questions, strict=True))
    distinct = list(by_key)
    groups = [distinct[i : i + judge.together] for i in range(0, len(distinct), judge.together)]
    asked = [key for group in groups if any(key not in kept for key in group) for key in group]
    without: list[str] = []
    one_at_a_time = Lock()
    with tqdm(total=len(distinct), initial=len(distinct) - len(asked), desc=judge.name, unit="answer") as bar:

        def keep(number: int, verdict: Verdict) -> None:
            with one_at_a_time:
                if verdict.score is None:
                    without.append(verdict.reply)
                elif asked[number] not in kept:
                    kept.put(asked[number], verdict._asdict())
                bar.update()

        try:
            if asked:
                judge.ask([by_key[key] for key in asked], keep)
        except UserError as error:
            left = sum(key not in kept for key in distinct)
            raise UserError(f"{error}; {left} of {len(distinct)} answers have no score yet") from error
    if without:
        _complain(judge.name, len(distinct), without)
    return [kept[key]["score"] if key in kept else None for key in keys]


def _complain(name: str, count: int, without: Sequence[str]) -> None:
    """Say how many answers have no score and why.

    Raises:
        UserError: none has one.
    """
    first = " ".join(without[0].split())[:200]
    if len(without) == count:
        raise UserError(f"judge {name}: no score for any of {count} answers; it replied: {first}")
    log.warning(
        "judge %s: no score for %d of %d answers, which the same command asks again; it replied: %s", name, len(without), count, first
    )
