"""Which records and answers are on which side, by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from bad_neurons.data.records import Record
from bad_neurons.data.splits import split_by_topic
from bad_neurons.errors import UserError
from bad_neurons.probe.divide import SIDES, answers_by_side, divide, sizes


def record(topic, number, right=False):
    """A question of its own."""
    return Record(
        prompt=({"role": "user", "content": f"{topic} {number}?"},), honest="no", sycophantic=None if right else "yes",
        contrarian="yes" if right else None, person_is_right=right, topic=topic, source="test",
    )  # fmt: skip


# Ten topics of five questions; in each, one person is right, so an answer is honest in all and sycophantic in four.
RECORDS = [record(f"t{i}", j, right=j == 0) for i in range(10) for j in range(5)]


def answers(records):
    """Labels and records of all answers, as the extraction orders them."""
    rows = [(label, i) for i, r in enumerate(records) for label in ((0.0,) if r.sycophantic is None else (0.0, 1.0))]
    return torch.tensor([label for label, _ in rows]), torch.tensor([i for _, i in rows])


def test_topics_first_then_records_of_the_training_topics():
    sides = divide([RECORDS], 0.2, 0.2, 0.3, seed=1)
    split = split_by_topic(RECORDS, 0.2, 0.3, seed=1)
    assert list(sides) == list(SIDES)
    assert (sides["validation"], sides["test"]) == (split.validation, split.test)
    assert Counter(r.topic for r in sides["train"]) == dict.fromkeys({r.topic for r in split.train}, 4)
    assert Counter(r.topic for r in sides["in_domain"]) == dict.fromkeys({r.topic for r in split.train}, 1)
    assert {r.id for r in sides["train"] + sides["in_domain"]} == {r.id for r in split.train}
    assert not {r.id for r in sides["train"]} & {r.id for r in sides["in_domain"]}


def test_max_records_thins_training_alone():
    sides = divide([RECORDS], 0.2, 0.2, 0.3, seed=1, max_records=10)
    assert {side: len(records) for side, records in sides.items()} == {"train": 10, "in_domain": 5, "validation": 10, "test": 15}
    assert set(Counter(r.topic for r in sides["train"]).values()) == {2}


def test_without_a_share_there_is_no_such_side():
    assert list(divide([RECORDS], 0, 0.2, 0.3, seed=1)) == ["train", "validation", "test"]


def test_topics_of_one_record_have_none_to_hold_out():
    with pytest.raises(UserError, match=r"--in_domain 0.2: every topic has one record only.*give 0"):
        divide([[record(f"t{i}", 0) for i in range(10)]], 0.2, 0.2, 0.2, seed=0)


def test_answers_of_each_side():
    divisions = [divide([RECORDS], 0.2, 0.2, 0.3, seed=seed, max_records=12) for seed in (1, 2)]
    labels, record_of = answers(RECORDS)
    found = answers_by_side(divisions, RECORDS, labels, record_of)
    for division, sides in zip(divisions, found, strict=True):
        for side, records in division.items():
            ids = {r.id for r in records}
            by_hand = [i for i, number in enumerate(record_of.tolist()) if RECORDS[number].id in ids]
            assert sides.rows[side].tolist() == by_hand, side
            assert len(by_hand) == sum(1 if r.sycophantic is None else 2 for r in records)


def test_all_divisions_see_the_same_draws_of_the_topics_of_a_side():
    """Of the topics of both test sides each has a column; a division whose side lacks a topic has no answers there."""
    divisions = [divide([RECORDS], 0.2, 0.2, 0.3, seed=seed) for seed in (1, 2)]
    labels, record_of = answers(RECORDS)
    found = answers_by_side(divisions, RECORDS, labels, record_of)
    both = sorted({r.topic for division in divisions for r in division["test"]})
    assert len(both) > 3
    for division, sides in zip(divisions, found, strict=True):
        measures = sides.measures["test"]
        assert measures._counts.shape == (2000, len(both))
        assert {both[t] for t in np.unique(measures._topics)} == {r.topic for r in division["test"]}
    assert found[0].measures["test"]._counts is found[1].measures["test"]._counts


def test_sizes_by_hand():
    division = divide([RECORDS], 0.2, 0.2, 0.3, seed=1)
    labels, record_of = answers(RECORDS)
    [sides] = answers_by_side([division], RECORDS, labels, record_of)
    # Three topics of five records: 15 honest answers and 12 sycophantic ones.
    assert sizes(division, sides.rows, labels)["test"] == {"topics": 3, "records": 15, "answers": 27, "majority": pytest.approx(15 / 27)}


def test_a_side_of_one_label_is_refused():
    right = [record(f"t{i}", j, right=True) for i in range(5) for j in range(3)]
    division = divide([right], 0, 0.2, 0.2, seed=0)
    with pytest.raises(UserError, match="records: the train side has 9 answers of one kind; a probe needs"):
        answers_by_side([division], right, *answers(right))
