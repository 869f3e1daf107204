"""Splits by topic: no topic is ever on two sides.

Several sources (``embedded,anthropic:phil``) are divided each by itself, so a topic of one stands on the same side whatever
else is read beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

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
    parts = [split_by_topic(load_records(source), validation, test, seed) for source in sources_of(sources)]
    return Split(*([record for part in parts for record in part[side]] for side in range(3)))


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
