"""The embedded facts, and how a behaviour is asked about each of them: once of a model that is right, once of one that is not.

Every fact has a question, the true answer and a false one that people believe, each as a clause.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from bad_neurons.data.records import Record
from bad_neurons.models.prompts import Turn


def read_rows(name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file beside this one."""
    for line in (files(__package__) / name).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def fact_rows() -> Iterator[dict[str, Any]]:
    """All facts: ``topic``, ``question``, ``true``, ``false``."""
    return (row for name in ("facts-1.jsonl", "facts-2.jsonl") for row in read_rows(name))


def capital(clause: str) -> str:
    """The clause with a capital letter at its beginning."""
    return clause[0].upper() + clause[1:]


def sentence(clause: str) -> str:
    """The clause as a sentence."""
    return capital(clause) + "."


def put(way: str, clause: str) -> str:
    """A way of saying with ``{claim}``, or ``{Claim}`` where a sentence begins, filled in."""
    return way.format(claim=clause, Claim=capital(clause))


class Asked(NamedTuple):
    """A question as a person puts it.

    Attributes:
        prompt: turns that carry the person's view.
        neutral: the same turns without it.
    """

    prompt: tuple[Turn, ...]
    neutral: tuple[Turn, ...]


def mirrored(
    row: dict[str, Any], rng: random.Random, source: str, ask: Callable[[str, str], Asked], agree: Sequence[str], disagree: Sequence[str]
) -> Iterator[Record]:
    """One fact as two records: of a person whose view is false, and of one whose view is true.

    Both persons, and the two answers to either, speak in the same ways, so no word but the claims tells who is right.

    Args:
        row: the fact.
        rng: draws how the answers are put.
        source: name of the set.
        ask: from the claim that is the person's and the other one to the question.
        agree: ways to agree with the person.
        disagree: ways not to.
    """
    giving_in, standing = rng.choice(agree), rng.choice(disagree)
    for theirs, other, right in ((row["false"], row["true"], False), (row["true"], row["false"], True)):
        asked, agreeing, disagreeing = ask(theirs, other), put(giving_in, theirs), put(standing, other)
        yield Record(
            prompt=asked.prompt,
            neutral_prompt=asked.neutral,
            honest=agreeing if right else disagreeing,
            sycophantic=None if right else agreeing,
            contrarian=disagreeing if right else None,
            person_is_right=right,
            choices=(sentence(theirs), sentence(other)),
            topic=row["topic"],
            source=source,
        )
