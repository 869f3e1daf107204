"""Which answers a comparison of probes learns from, and which it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bad_neurons.data.records import Record
from bad_neurons.data.splits import hold_out, split_each
from bad_neurons.data.tuning import draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.probe.measures import Measures, topic_counts

SIDES = ("train", "in_domain", "validation", "test")

Division = dict[str, list[Record]]  # records by side


def divide(
    sources: Sequence[Sequence[Record]], in_domain: float, validation: float, test: float, seed: int, max_records: int = 0
) -> Division:
    """Records of one or several sources by side: topics are divided first, then the records of the training topics.

    Args:
        sources: records of each source.
        in_domain: share of the training topics' questions held out; without any there is no such side.
        validation: share of the topics for validation.
        test: share of the topics for the test.
        seed: seed of both divisions.
        max_records: at most so many records for training, drawn evenly over topics; 0 means all.

    Raises:
        UserError: too few topics, or no training topic has two records.
    """
    split = split_each(sources, validation, test, seed)
    held = hold_out(split.train, in_domain, seed)
    if in_domain and not held.in_domain:
        raise UserError(f"--in_domain {in_domain}: every topic has one record only, so none can be held out; give 0")
    sides = {
        "train": draw_evenly(held.train, max_records, seed),
        "in_domain": held.in_domain,
        "validation": split.validation,
        "test": split.test,
    }
    return {side: records for side, records in sides.items() if records}


class Answers(NamedTuple):
    """Answers of one division by side.

    Attributes:
        rows: numbers of the answers of each side, int64.
        measures: what measures probes on each side.
    """

    rows: dict[str, Tensor]
    measures: dict[str, Measures]


def answers_by_side(divisions: Sequence[Division], records: Sequence[Record], labels: Tensor, record: Tensor) -> list[Answers]:
    """The answers of each division; the draws of topics of one side are the same for all divisions.

    Args:
        divisions: records by side, each with the same sides.
        records: all records that are in some division.
        labels: labels of all answers, [N].
        record: which of the records each answer belongs to, [N].

    Raises:
        UserError: a side has answers of one label only.
    """
    number = {id(r): i for i, r in enumerate(records)}
    topic = {id(r): f"{r.source} {r.topic}" for r in records}
    found = [Answers({}, {}) for _ in divisions]
    for side in divisions[0]:
        names = {name: i for i, name in enumerate(sorted({topic[id(r)] for division in divisions for r in division[side]}))}
        counts = topic_counts(len(names))
        for division, answers in zip(divisions, found, strict=True):
            chosen = torch.zeros(len(records), dtype=torch.bool)
            chosen[[number[id(r)] for r in division[side]]] = True
            rows = chosen[record].nonzero()[:, 0]
            y = labels[rows].numpy() > 0
            if y.all() or not y.any():
                raise UserError(f"records: the {side} side has {len(y)} answers of one kind; a probe needs sycophantic and honest ones")
            topics = np.array([names[topic[id(records[i])]] for i in record[rows].tolist()])
            answers.rows[side] = rows
            answers.measures[side] = Measures(y, topics, counts)
    return found


def sizes(division: Division, rows: Mapping[str, Tensor], labels: Tensor) -> dict[str, dict[str, float]]:
    """Of each side: topics, records, answers, and the accuracy of always naming the commoner label."""
    return {
        side: {
            "topics": len({(r.source, r.topic) for r in records}),
            "records": len(records),
            "answers": len(rows[side]),
            "majority": float(max(share := float(labels[rows[side]].mean()), 1 - share)),
        }
        for side, records in division.items()
    }
