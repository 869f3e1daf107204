"""Long answers by log-probability, by hand and against transformers."""

from __future__ import annotations

import math

import pytest

from bad_neurons.data.records import Record
from bad_neurons.evaluation.bootstrap import estimate
from bad_neurons.evaluation.scoring import Score
from bad_neurons.evaluation.suites import score_items, suite_of
from bad_neurons.evaluation.suites.open_ended import OpenEnded
from bad_neurons.models.view import view_decoder
from bad_neurons.testing import tiny_tokenizer
from helpers import by_transformers

SUITE = suite_of("open-ended@some/place")


def record(topic, source="open-ended:view", sycophantic="Yes, and how!", honest="No."):
    return Record(({"role": "user", "content": topic},), honest, topic, source, sycophantic=sycophantic)


def test_the_source_has_its_own_suite():
    assert isinstance(SUITE, OpenEnded)


def test_both_answers_behind_the_prompt_and_nothing_else():
    tea = record("tea")
    assert [(r.turns, r.answer) for r in SUITE.requests(tea)] == [(tea.prompt, "Yes, and how!"), (tea.prompt, "No.")]


def test_a_row_by_hand():
    """The sum prefers the honest answer because it is short; a token of the sycophantic one is likelier."""
    row = SUITE.row(record("tea"), [Score(-20.0, 10), Score(-12.0, 4)])
    assert {k: row[k] for k in ("topic", "source", "valid", "tokens")} == {
        "topic": "tea", "source": "open-ended:view", "valid": True, "tokens": [10, 4],
    }  # fmt: skip
    assert row["odds"] == pytest.approx(-8.0)
    assert row["odds_per_token"] == pytest.approx(-2.0 + 3.0)


def test_a_summary_by_hand():
    scores = {
        "tea": [Score(-20.0, 10), Score(-12.0, 4)],  # sum -8, per token +1
        "jam": [Score(-9.0, 3), Score(-10.0, 5)],  # +1, -1
        "fog": [Score(-4.0, 4), Score(-12.0, 4)],  # +8, +2
        "ash": [Score(-4.0, 4), Score(math.nan, 4)],
    }
    rows = [SUITE.row(record(t, "open-ended:character" if t == "jam" else "open-ended:view"), s) for t, s in scores.items()]
    found = SUITE.summarise(rows)
    assert (found["n"], found["topics"], found["valid"]) == (4, 4, 0.75)
    assert found["match_rate_per_token"] == estimate([1, 0, 1], ["tea", "jam", "fog"])
    assert found["odds_per_token"] == estimate([1, -1, 2], ["tea", "jam", "fog"])
    assert found["match_rate"] == estimate([0, 1, 1], ["tea", "jam", "fog"])
    assert {source: (part["n"], part["odds_per_token"]["mean"]) for source, part in found["by_source"].items()} == {
        "open-ended:character": (1, -1.0), "open-ended:view": (3, 1.5),
    }  # fmt: skip


def test_without_any_number_there_are_no_estimates():
    found = SUITE.summarise([SUITE.row(record("tea"), [Score(math.nan, 1), Score(-1.0, 1)])])
    assert (found["valid"], found["match_rate_per_token"], found["odds_per_token"], found["match_rate"]) == (0.0, None, None, None)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"])
def test_against_transformers(tiny, template):
    lm, tokenizer = tiny("gemma3"), tiny_tokenizer(template)
    records = [record("Tea?", sycophantic="I love it as you do.", honest="It is hot."), record("Jam?", sycophantic="Ä", honest="Äh, no.")]
    rows = score_items(view_decoder(lm.model), tokenizer, {"open-ended": records})["open-ended"].before
    for row, given in zip(rows, records, strict=True):
        text = given.prompt[0]["content"]
        prompt = f"<user>{text}<assistant>" if template else f"Human: {text}\n\nAssistant:"
        answers = [answer if template else f" {answer}" for answer in given.scored]
        lengths = [len(answer.encode()) for answer in answers]  # a token a byte
        said = [by_transformers(lm.model, tokenizer, prompt, answer) for answer in answers]
        assert row["tokens"] == lengths
        assert row["odds"] == pytest.approx(said[0] - said[1], rel=1e-4)
        assert row["odds_per_token"] == pytest.approx(said[0] / lengths[0] - said[1] / lengths[1], rel=1e-4)
