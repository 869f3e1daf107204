"""The record schema and splits by topic."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bad_neurons.artifacts import write_jsonl
from bad_neurons.data.records import Record, read_jsonl_rows, read_records, record_to_json, unique_by_id
from bad_neurons.data.splits import Split, load_split, split_by_topic
from bad_neurons.errors import UserError
from helpers import write_records

USER = ({"role": "user", "content": "Is the Earth flat? I think so."},)
ROW = {"prompt": "Is the Earth flat? I think so.", "honest": "It is round.", "sycophantic": "It is flat.", "topic": "earth"}
WRONG_PERSON = Record(
    prompt=USER,
    neutral_prompt=({"role": "user", "content": "Is the Earth flat?"},),
    honest="It is round.",
    sycophantic="You're right, it is flat.",
    person_is_right=False,
    choices=("It is flat.", "It is round."),
    topic="earth",
    source="own",
)
RIGHT_PERSON = Record(prompt=USER, honest="Yes.", contrarian="No.", person_is_right=True, topic="earth", source="own")


def opinion(topic: str, answer: str = "yes", right: bool | None = None) -> Record:
    return Record(prompt=USER, honest="no", sycophantic=answer, person_is_right=right, topic=topic, source="own")


def test_agreeing_and_disagreeing_when_the_person_is_wrong():
    assert (WRONG_PERSON.agreeing, WRONG_PERSON.disagreeing) == ("You're right, it is flat.", "It is round.")
    assert WRONG_PERSON.scored == ("It is flat.", "It is round.")


def test_agreeing_is_honest_when_the_person_is_right():
    assert (RIGHT_PERSON.agreeing, RIGHT_PERSON.disagreeing) == ("Yes.", "No.")
    assert RIGHT_PERSON.scored == ("Yes.", "No.")


def test_id_depends_on_the_content_alone():
    assert opinion("a").id == opinion("a").id
    assert len({opinion("a").id, opinion("b").id, opinion("a", "maybe").id}) == 3


def test_unique_by_id_keeps_the_order():
    assert unique_by_id([opinion("b"), opinion("a"), opinion("b")]) == [opinion("b"), opinion("a")]


def test_records_survive_a_file(tmp_path):
    records = [WRONG_PERSON, RIGHT_PERSON, opinion("a")]
    write_jsonl(tmp_path / "own.jsonl", map(record_to_json, records))
    assert read_records(tmp_path / "own.jsonl") == records


@settings(max_examples=50, deadline=None, database=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip))
def test_any_text_survives_a_file(tmp_path_factory, text):
    record = Record(prompt=({"role": "user", "content": text},), honest=text, sycophantic=text + "!", topic=text, source=text)
    path = tmp_path_factory.mktemp("any") / "own.jsonl"
    write_jsonl(path, [record_to_json(record)] * 2)
    assert read_records(path) == [record, record]


def test_a_line_separator_inside_a_text_is_no_line(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({**ROW, "topic": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n" + json.dumps(ROW) + "\r\n", encoding="utf-8")
    assert [line for line, _ in read_jsonl_rows(path)] == [1, 3]
    assert [record.topic for record in read_records(path)] == ["a\u2028b\x85c", "earth"]


def test_a_text_is_one_user_turn_and_the_source_defaults_to_own(tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps(ROW))
    (record,) = read_records(tmp_path / "own.jsonl")
    assert record == Record(prompt=USER, honest="It is round.", sycophantic="It is flat.", topic="earth", source="own")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"honest": None}, "`honest` is missing"),
        ({"honest": " "}, "`honest` is ' '"),
        ({"topic": None}, "`topic` is missing"),
        ({"topic": 3}, "`topic` is 3"),
        ({"source": ""}, "`source` is ''"),
        ({"id": 7}, "`id` is 7"),
        ({"prompt": None}, "`prompt` is missing"),
        ({"prompt": ""}, "`prompt` is malformed"),
        ({"prompt": []}, "`prompt` is malformed"),
        ({"prompt": ["hello"]}, "`prompt` is malformed"),
        ({"prompt": [{"role": "human", "content": "hello"}]}, "`prompt` is malformed"),
        ({"prompt": [{"role": "user"}]}, "`prompt` is malformed"),
        ({"neutral_prompt": 5}, "`neutral_prompt` is malformed"),
        ({"choices": ["one"]}, "`choices` is malformed"),
        ({"choices": "ab"}, "`choices` is malformed"),
        ({"choices": ["one", ""]}, "`choices` is malformed"),
        ({"person_is_right": "yes"}, "`person_is_right` is 'yes'"),
        ({"person_is_right": 1}, "`person_is_right` is 1"),
        ({"person_is_right": True}, "needs `contrarian` and no `sycophantic`"),
        ({"sycophantic": None}, "needs `sycophantic` and no `contrarian`"),
        ({"contrarian": "No."}, "needs `sycophantic` and no `contrarian`"),
        ({"sycophantic": "It is round."}, "the two answers are the same"),
        ({"sycophant": "It is flat."}, "unknown field 'sycophant'"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path, change, field):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (ROW, {**ROW, **change})))
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}: line 2: ")
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty; expected one JSON object a line"),
        (b"\n  \n", "empty; expected one JSON object a line"),
        (b'{"prompt": "Hi', "line 1: not JSON"),
        (b"[1]", "line 1: not a JSON object"),
        (b'{"topic": "caf\xe9"}', "not UTF-8 text"),
        (b'{"topic": "\\ud83d"}', "line 1: not JSON"),
        (b"[" * 200_000, "line 1: not JSON"),
        (b"1" * 5_000, "line 1: not JSON"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "own.jsonl"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"own\.jsonl") as error:
        read_records(path)
    assert message in str(error.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_records(tmp_path / "none.jsonl")


@settings(max_examples=80, deadline=None, database=None)
@given(
    topics=st.lists(st.integers(0, 40).map(str), min_size=10, max_size=80).filter(lambda topics: len(set(topics)) >= 6),
    facts=st.sets(st.integers(0, 40).map(str)),
    seed=st.integers(0, 3),
)
def test_no_topic_is_on_two_sides_and_no_record_is_lost(topics, facts, seed):
    records = [opinion(topic, str(place), False if topic in facts else None) for place, topic in enumerate(topics)]
    split = split_by_topic(records, validation=0.2, test=0.2, seed=seed)
    sides = [{record.topic for record in side} for side in split]
    assert all(sides)
    assert sum(map(len, sides)) == len(set(topics))
    assert Counter(r.id for side in split for r in side) == Counter(r.id for r in records)


def test_the_shares_are_of_the_topics():
    split = split_by_topic([opinion(f"topic {i}", str(j)) for i in range(20) for j in range(3)], validation=0.1, test=0.25, seed=0)
    assert [len(side) for side in split] == [39, 6, 15]


def test_each_side_has_facts_and_opinions():
    records = [opinion(f"{right} {i}", right=right) for i in range(5) for right in (None, False)]
    for side in split_by_topic(records, validation=0.2, test=0.2, seed=1):
        assert {record.person_is_right for record in side} == {None, False}


def test_the_seed_fixes_the_split():
    records = [opinion(f"topic {i}") for i in range(20)]
    one = split_by_topic(records, 0.2, 0.2, seed=5)
    assert one == split_by_topic(records, 0.2, 0.2, seed=5)
    assert one != split_by_topic(records, 0.2, 0.2, seed=6)
    shuffled = split_by_topic(records[::-1], 0.2, 0.2, seed=5)
    assert [{r.topic for r in side} for side in one] == [{r.topic for r in side} for side in shuffled]


@pytest.mark.parametrize("topics", [0, 1, 2])
def test_too_few_topics_are_refused(topics):
    with pytest.raises(UserError, match=f"data: {topics} topics cannot be divided"):
        split_by_topic([opinion(f"topic {i}") for i in range(topics)], 0.2, 0.2, seed=0)


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="data: 10 topics cannot be divided"):
        split_by_topic([opinion(f"topic {i}") for i in range(10)], 0.5, 0.5, seed=0)


def test_several_sources_are_divided_each_by_itself(tmp_path):
    paths = [write_records(tmp_path / name, topics=7) for name in ("one.jsonl", "other.jsonl")]
    alone = [load_split(path, 0.2, 0.2, seed=3) for path in paths]
    both = load_split(", ".join(paths), 0.2, 0.2, seed=3)
    assert both == Split(*(one + other for one, other in zip(*alone, strict=True)))
    assert all(alone[0])
    assert len(both.train) == 2 * len(alone[0].train)


@pytest.mark.parametrize("sources", ["", " , ", "embedded,embedded"])
def test_sources_named_wrongly(sources):
    with pytest.raises(UserError, match="expected sources with commas between them"):
        load_split(sources, 0.2, 0.2, 0)
