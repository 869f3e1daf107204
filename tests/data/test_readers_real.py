"""Readers on the real public files, where they are."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from bad_neurons.data.readers import load_records, local_path
from bad_neurons.data.readers.syco_bench import COLUMNS, read_questions

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
REAL = Path(os.environ.get("BAD_NEURONS_DATA") or SHARED)
pytestmark = pytest.mark.skipif(not (REAL / "anthropic-sycophancy").is_dir(), reason=f"no public data in {REAL} (set BAD_NEURONS_DATA)")


@pytest.mark.parametrize(
    ("source", "lines", "records", "topics"),
    [
        ("anthropic:nlp", 400, 400, 18),
        ("anthropic:poli", 400, 400, 8),
        ("anthropic:phil", 126, 126, 25),
        ("truthfulqa", 408, 814, 36),
        ("syco-bench:pickside", 41, 80, 40),
        ("syco-bench:mirror", 41, 80, 40),
        ("open-ended", 30, 29, 29),
    ],
)
def test_counts_of_the_selection_in_shared(source, lines, records, topics):
    path = local_path(f"{source}@{REAL}")
    if path is None or path.read_text(encoding="utf-8").count("\n") != lines:
        pytest.skip(f"{path} is not the selection of {lines} lines that the counts are of")
    read = load_records(f"{source}@{path}")
    assert len(read) == records
    assert len({record.topic for record in read}) == topics


@pytest.mark.parametrize("kind", ["nlp", "poli", "phil"])
def test_model_written_evaluations(kind):
    for record in load_records(f"anthropic:{kind}@{REAL}"):
        stem, question = record.prompt[0]["content"], record.neutral_prompt[0]["content"]
        assert stem.endswith(question)
        assert "my name is" in stem
        assert "my name is" not in question
        assert not stem.endswith(("Choices:", "Answer:"))
        assert "(A)" not in question
        assert record.sycophantic
        assert record.honest
        assert record.person_is_right is None
        assert record.choices is None


@pytest.mark.parametrize("kind", ["nlp", "poli", "phil"])
def test_topics_are_not_split_by_biography(kind):
    people, answers = Counter(), defaultdict(set)
    for record in load_records(f"anthropic:{kind}@{REAL}"):
        people[record.topic] += 1
        answers[record.topic].add(frozenset(record.scored))
    assert min(people.values()) >= 2
    assert {len(pairs) for pairs in answers.values()} == {1}


def test_truthfulqa():
    records = load_records(f"truthfulqa@{REAL}")
    assert Counter(record.person_is_right for record in records) == {True: len(records) // 2, False: len(records) // 2}


def test_open_ended():
    records = load_records(f"open-ended@{REAL}")
    assert {record.source for record in records} == {"open-ended:view", "open-ended:character"}
    assert all(len(text) > 50 for record in records for text in record.scored)


@pytest.mark.parametrize("test", ["pickside", "mirror"])
def test_syco_bench(test):
    records = load_records(f"syco-bench:{test}@{REAL}")
    assert all(one.scored == other.scored[::-1] for one, other in zip(records[::2], records[1::2], strict=True))


def test_syco_bench_questions():
    assert {test: len(read_questions(test, REAL)) for test in COLUMNS} == {"pickside": 40, "mirror": 40, "whosaid": 40, "delusion": 20}
