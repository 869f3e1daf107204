"""The embedded sets of other behaviours: who says what, balance, and that nothing but the claims tells who is right."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from bad_neurons.data.embedded import are_you_sure, false_premise
from bad_neurons.data.embedded.facts import fact_rows
from bad_neurons.data.readers import available, load_records, local_path
from bad_neurons.data.splits import load_split

FACTS = list(fact_rows())
SOURCES = ("embedded:are-you-sure", "embedded:false-premise")
SURE, PREMISE = (load_records(source) for source in SOURCES)
BOTH = pytest.mark.parametrize("records", [SURE, PREMISE], ids=SOURCES)


def clause(sentence):
    return sentence.rstrip(".")


def without(text, choice):
    return re.sub(re.escape(clause(choice)), "CLAIM", text, flags=re.IGNORECASE)


def way(text, record):
    """A text without the claims in it: how it is said."""
    long, short = sorted(record.scored, key=len, reverse=True)  # one may be part of the other
    return without(without(text, long), short)


def says_only(text, claim, other):
    """Whether ``other`` is nowhere in a text but inside ``claim``."""
    return clause(other).casefold() not in without(text, claim).casefold()


def speech(turns):
    return [turn["content"] for turn in turns]


@BOTH
def test_size_and_balance(records):
    assert len(FACTS) == 460
    assert Counter(r.person_is_right for r in records) == {True: 460, False: 460}
    assert Counter((r.topic, r.person_is_right) for r in records) == {(row["topic"], right): 10 for row in FACTS for right in (True, False)}
    assert len({r.id for r in records}) == 920
    assert len({r.id for r in (*SURE, *PREMISE, *load_records("embedded"))}) == 920 + 920 + 1240


@pytest.mark.parametrize(("source", "records"), [*zip(SOURCES, (SURE, PREMISE), strict=True)])
def test_source(source, records):
    assert {r.source for r in records} == {source}
    assert available(source)
    assert local_path(source) is None


@BOTH
def test_each_fact_is_asked_by_one_person_of_either_side(records):
    for row, wrong, right in zip(FACTS, records[::2], records[1::2], strict=True):
        true, false = (claim[0].upper() + claim[1:] + "." for claim in (row["true"], row["false"]))
        assert (wrong.person_is_right, wrong.scored, wrong.topic) == (False, (false, true), row["topic"])
        assert (right.person_is_right, right.scored, right.topic) == (True, (true, false), row["topic"])
        for text, claim in ((wrong.honest, true), (wrong.sycophantic, false), (right.honest, true), (right.contrarian, false)):
            assert clause(claim).casefold() in text.casefold(), text


@BOTH
def test_both_persons_and_the_answers_to_either_speak_in_the_same_ways(records):
    for wrong, right in zip(records[::2], records[1::2], strict=True):
        assert [way(t, wrong) for t in speech(wrong.prompt)] == [way(t, right) for t in speech(right.prompt)]
        assert way(wrong.sycophantic, wrong) == way(right.honest, right)  # agreeing
        assert way(wrong.honest, wrong) == way(right.contrarian, right)  # not


@BOTH
def test_no_opening_word_gives_sycophancy_away(records):
    """The best guess from how an answer begins, whatever it is, is no better than to call nothing sycophantic."""
    kinds = [(way(r.honest, r), 0) for r in records] + [(way(r.sycophantic, r), 1) for r in records if r.sycophantic]
    by_way = {how: Counter(label for other, label in kinds if other == how) for how, _ in kinds}
    assert sum(max(counts.values()) for counts in by_way.values()) == sum(label == 0 for _, label in kinds) == 920
    bare = sum(how == "CLAIM." for how, _ in kinds)
    assert 0.4 < bare / len(kinds) < 0.6
    assert len(by_way) == 9


def test_the_conversation():
    for record in SURE:
        (question, first, doubt), (again, same, neutral) = record.prompt, record.neutral_prompt
        assert [t["role"] for t in record.prompt] == [t["role"] for t in record.neutral_prompt] == ["user", "assistant", "user"]
        assert (question, first) == (again, same)
        assert clause(record.scored[1]).casefold() in first["content"].casefold()  # what the person doubts
        assert says_only(doubt["content"], *record.scored)
        asked = neutral["content"].removeprefix("Sorry, I didn't catch that. ")
        assert question["content"].endswith(asked)
        assert asked.endswith("?")


def test_doubts_are_mild_and_forceful_with_and_without_another_answer():
    named = [d for d in are_you_sure._DOUBTS if "laim}" in d]
    assert (len(named), len(are_you_sure._DOUBTS)) == (12, 24)
    used = Counter(way(r.prompt[2]["content"], r) for r in SURE)
    assert len(used) == 24
    assert min(used.values()) >= 2 * 8  # of 920 / 24 = 38
    with_claim = sum(count for how, count in used.items() if "CLAIM" in how)
    assert 0.4 < with_claim / 920 < 0.6


def test_the_premise_and_the_question_without_it():
    for record in PREMISE:
        (asked,) = record.prompt
        assert clause(record.scored[0]).casefold() in asked["content"].casefold()
        assert says_only(asked["content"], *record.scored)
    assert [r.neutral_prompt[0]["content"] for r in PREMISE[::2]] == [row["question"] for row in FACTS]
    assert len({way(r.prompt[0]["content"], r) for r in PREMISE}) == len(false_premise._QUESTIONS) == 16


@BOTH
def test_texts_are_clean(records):
    for record in records:
        texts = [*speech(record.prompt), *speech(record.neutral_prompt), record.honest, record.agreeing, record.disagreeing]
        for text in texts:
            assert text == text.strip()
            assert not re.search(r"[{}]|  |[^.]\.\.$|[?!:,]\.", text), text
        assert all(text.endswith(".") for text in texts[-3:])


@BOTH
def test_topics_stand_on_the_same_side_as_in_the_first_set(records):
    sides = [load_split(f"embedded,{records[0].source}", 0.2, 0.2, seed) for seed in (0, 1)]
    for split in sides:
        topics = [{r.topic for r in side if r.source == records[0].source} for side in split]
        assert [len(t) for t in topics] == [28, 9, 9]
        for here, side in zip(topics, split, strict=True):
            assert here == {r.topic for r in side if r.source == "embedded" and r.person_is_right is not None}
    assert {r.topic for r in sides[0].test} != {r.topic for r in sides[1].test}


@pytest.mark.parametrize(("records", "make"), [(SURE, are_you_sure.are_you_sure_records), (PREMISE, false_premise.false_premise_records)])
def test_the_set_is_the_same_every_time(records, make):
    make.cache_clear()
    assert list(make()) == records
