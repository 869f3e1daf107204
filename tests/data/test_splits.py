"""Records held out within their topics, by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from bad_neurons.data.records import Record
from bad_neurons.data.splits import hold_out, split_by_topic, split_each


def record(topic, question, person, source="test", neutral=True):
    """A record whose question several persons may ask."""
    turn = lambda text: ({"role": "user", "content": text},)  # noqa: E731
    asked, person_asks = turn(f"{question}?"), turn(f"{person} asks: {question}?")
    return Record(person_asks, honest="no", sycophantic="yes", topic=topic, source=source, neutral_prompt=asked if neutral else None)


def by_topic(records):
    return Counter(r.topic for r in records)


@pytest.mark.parametrize(("share", "held"), [(0.2, 2), (0.25, 2), (0.5, 5), (0.01, 1), (0.99, 9)])
def test_whole_questions_are_held_out(share, held):
    """Two topics of ten questions, each asked by two persons; half a question rounds to the even number."""
    records = [record(f"t{i}", f"q{j}", person) for i in range(2) for j in range(10) for person in ("Ann", "Ben")]
    train, in_domain = hold_out(records, share, seed=3)
    assert by_topic(in_domain) == {"t0": 2 * held, "t1": 2 * held}
    assert by_topic(train) == {"t0": 20 - 2 * held, "t1": 20 - 2 * held}
    asked = [{(r.topic, r.neutral_prompt[0]["content"]) for r in side} for side in (train, in_domain)]
    assert not asked[0] & asked[1]
    assert [r for r in records if r in train] == train  # the order stays


def test_a_topic_of_one_question_gives_up_single_records():
    records = [record("t", "q", f"person {i}") for i in range(7)]
    train, in_domain = hold_out(records, 0.3, seed=0)
    assert (len(train), len(in_domain)) == (5, 2)


def test_records_without_a_neutral_prompt_are_questions_of_their_own():
    train, in_domain = hold_out([record("t", f"q{i}", "Ann", neutral=False) for i in range(5)], 0.2, seed=0)
    assert (len(train), len(in_domain)) == (4, 1)


def test_every_topic_keeps_one_and_one_record_alone_stays():
    records = [record("single", "q", "Ann"), *(record("pair", f"q{i}", "Ann") for i in range(2))]
    train, in_domain = hold_out(records, 0.9, seed=0)
    assert by_topic(train) == {"single": 1, "pair": 1}
    assert by_topic(in_domain) == {"pair": 1}


def test_nothing_is_held_out_for_a_share_of_0():
    records = [record("t", f"q{i}", "Ann") for i in range(5)]
    assert hold_out(records, 0, seed=0) == (records, [])


def test_the_seed_fixes_the_choice_and_topics_are_drawn_apart():
    records = [record(f"t{i}", f"q{j}", "Ann") for i in range(6) for j in range(10)]
    one = hold_out(records, 0.1, seed=1)
    assert one == hold_out(records, 0.1, seed=1)
    assert one != hold_out(records, 0.1, seed=2)
    assert len({r.neutral_prompt[0]["content"] for r in one.in_domain}) > 1  # not the same number in each topic


def test_topics_of_two_sources_with_one_name_are_two():
    records = [record("t", f"q{i}", "Ann", source) for source in ("one", "other") for i in range(5)]
    assert Counter(r.source for r in hold_out(records, 0.2, seed=0).in_domain) == {"one": 1, "other": 1}


def test_sources_are_divided_each_by_itself():
    one, other = ([record(f"{name}{i}", "q", "Ann", name) for i in range(10)] for name in ("a", "b"))
    alone = [split_by_topic(records, 0.2, 0.2, 5) for records in (one, other)]
    assert split_each([one, other], 0.2, 0.2, 5) == tuple(a + b for a, b in zip(*alone, strict=True))
