"""Splits by topic: no topic is ever on two sides.

Several sources (``embedded,anthropic:phil``) are divided each by itself, so a topic of one stands on the same side whatever
else is read beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from bad_neurons.data.readers import load_records
from bad_neurons.data.records import Record
from bad_neurons.errors import UserError


class Split(NamedTuple):
    """Records on three sides.

    Attributes:
        train: what is learned from.
        validation: what choices are made by.
        test: what results are reported on; nothing else ever sees it.
    """

    train: list[Record]
    validation: list[Record]
    test: list[Record]


def sources_of(sources: str) -> list[str]:
    """The single sources of a list with commas.

    Raises:
        UserError: nothing is named, or one is named twice.
    """
    names = [name.strip() for name in sources.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"records {sources!r}: expected sources with commas between them, each once, such as embedded,anthropic:phil")
    return names


def load_split(sources: str, validation: float, test: float, seed: int) -> Split:
    """The records of one or several sources (with commas between them), each source divided by itself.

    Raises:
        UserError: a source cannot be read or has too few topics.
    """
    return split_each([load_records(source) for source in sources_of(sources)], validation, test, seed)


def split_each(sources: Sequence[Sequence[Record]], validation: float, test: float, seed: int) -> Split:
    """Records of several sources, each source divided by itself.

    Raises:
        UserError: a source has too few topics.
    """
    parts = [split_by_topic(records, validation, test, seed) for records in sources]
    return Split(*([record for part in parts for record in part[side]] for side in range(3)))


def measured_records(
    source: str, trained_on: str | None, validation: float, test: float, seed: int, side: Literal["validation", "test"] = "test"
) -> list[Record]:
    """What may be measured of a source: one side of its split where ``trained_on`` (sources with commas) names it, else all of it."""
    records = load_records(source)
    if trained_on is None or source not in sources_of(trained_on):
        return records
    return getattr(split_by_topic(records, validation, test, seed), side)  # type: ignore[no-any-return]


def split_by_topic(records: Sequence[Record], validation: float, test: float, seed: int) -> Split:
    """Divide the topics at random: shares ``validation`` and ``test`` of them (one at least each), the rest for training.

    Topics of fact and topics of opinion are divided apart, so every side has both where there are enough.

    Raises:
        UserError: fewer than three topics, or shares that leave none for training.
    """
    kinds: dict[str, bool] = {}
    for record in records:
        kinds[record.topic] = kinds.get(record.topic, True) and record.person_is_right is None
    sides: dict[str, int] = {}
    groups = [sorted(t for t, opinion in kinds.items() if opinion is kind) for kind in (False, True)]
    if min(len(g) for g in groups) < 3:
        groups = [sorted(kinds)]
    for topics in groups:
        random.Random(seed).shuffle(topics)
        n_validation, n_test = (max(1, round(share * len(topics))) for share in (validation, test))
        if n_validation + n_test >= len(topics):
            raise UserError(
                f"data: {len(topics)} topics cannot be divided into training, validation ({validation}) and test ({test}); "
                "give records of more topics or smaller shares"
            )
        for place, topic in enumerate(topics):
            sides[topic] = 2 if place < n_test else 1 if place < n_test + n_validation else 0
    train, held_out, tested = ([r for r in records if sides[r.topic] == side] for side in range(3))
    return Split(train, held_out, tested)


class HeldOut(NamedTuple):
    """Training records divided once more, within their topics.

    Attributes:
        train: what is learned from.
        in_domain: other records of the same topics: what is learned holds here if it holds at all.
    """

    train: list[Record]
    in_domain: list[Record]


def hold_out(records: Sequence[Record], share: float, seed: int) -> HeldOut:
    """Hold out a share of the records within each topic.

    Where a topic has several questions, whole questions are held out, so none is known from another person who asked it; a
    topic that is one question gives up single records. Each topic gives up one at least and keeps one at least.

    Args:
        records: records of the training topics.
        share: share of the questions (or records) of each topic; 0 holds out nothing.
        seed: seed of the choice.
    """
    if not share:
        return HeldOut(list(records), [])
    topics: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        topics.setdefault((record.source, record.topic), []).append(record)
    held: set[int] = set()
    for name in sorted(topics):
        units = _questions(topics[name])
        random.Random(f"{seed} {name}").shuffle(units)
        count = min(len(units) - 1, max(1, round(share * len(units))))
        held |= {id(record) for unit in units[:count] for record in unit}
    return HeldOut([r for r in records if id(r) not in held], [r for r in records if id(r) in held])


def _questions(records: Sequence[Record]) -> list[list[Record]]:
    """Records of one topic by question, or each by itself where there is one question only."""
    questions: dict[str, list[Record]] = {}
    for record in records:
        asked = record.neutral_prompt or record.prompt  # the question as such, where the record has it
        questions.setdefault(repr(asked), []).append(record)
    return list(questions.values()) if len(questions) > 1 else [[record] for record in records]
