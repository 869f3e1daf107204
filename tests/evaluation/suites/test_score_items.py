"""Several sources scored together, both sides or one."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.evaluation import suites
from bad_neurons.evaluation.suites import score_items, suite_of
from bad_neurons.evaluation.suites.two_choice import TwoChoice
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.edits import NeuronDelta


@pytest.fixture
def sources(record):
    """Records of two sources; one question stands in both."""
    return {"embedded": [record("tea"), record("jam", right=False)], "own.jsonl": [record("fog", right=True), record("tea")]}


@pytest.fixture
def edited(tiny, choose):
    """A tiny model with an edit that changes it."""
    lm = tiny()
    view = view_decoder(lm.model)
    edit = NeuronDelta(view, choose(lm, "intermediate"))
    edit.restore({name: torch.randn_like(value) for name, value in edit.deltas().items()})
    return lm, view, edit


def numbers(rows):
    return [[value for value in row.values() if isinstance(value, float)] for row in rows]


def test_together_as_alone(edited, sources):
    lm, view, edit = edited
    together = score_items(view, lm.tokenizer, sources, edit)
    assert list(together) == list(sources)
    for source, records in sources.items():
        for side in ("before", "after"):
            rows = getattr(together[source], side)
            alone = [getattr(score_items(view, lm.tokenizer, {source: [record]}, edit)[source], side)[0] for record in records]
            assert [row["id"] for row in rows] == [record.id for record in records]
            assert numbers(rows) == [pytest.approx(row, abs=1e-4) for row in numbers(alone)]
    assert max(abs(a["odds"] - b["odds"]) for a, b in zip(*together["embedded"], strict=True)) > 1e-2


def test_everything_is_scored_in_one_call(tiny, sources, monkeypatch):
    lm = tiny()
    calls = []
    original = suites.answer_log_probs
    monkeypatch.setattr(suites, "answer_log_probs", lambda *a, **k: calls.append(len(a[2])) or original(*a, **k))
    found = score_items(view_decoder(lm.model), lm.tokenizer, sources)
    assert calls == [4 * 8]
    assert found["embedded"].before[0] == found["own.jsonl"].before[1]
    assert all(sides.after is None for sides in found.values())


def test_the_edited_side_alone(edited, sources, monkeypatch):
    lm, view, edit = edited
    both = score_items(view, lm.tokenizer, sources, edit, letters=False)
    clean = {source: sides.before for source, sides in both.items()}
    asked = []
    original = suites.answer_log_probs
    monkeypatch.setattr(suites, "answer_log_probs", lambda *a, **k: asked.append(a[3]) or original(*a, **k))
    again = score_items(view, lm.tokenizer, sources, edit, letters=False, clean=clean)
    assert asked == [None]  # one side
    assert again == both
    assert not any("letter_odds" in row for row in again["embedded"].after)


def test_clean_rows_of_other_records_are_refused(edited, sources):
    lm, view, edit = edited
    clean = {source: sides.before for source, sides in score_items(view, lm.tokenizer, sources, edit).items()}
    for wrong in ({"embedded": clean["embedded"]}, {**clean, "own.jsonl": clean["own.jsonl"][::-1]}):
        with pytest.raises(ValueError, match=r"clean: the rows of own\.jsonl are not those of its 2 records; expected one a record"):
            score_items(view, lm.tokenizer, sources, edit, clean=wrong)


@pytest.mark.parametrize("source", ["embedded", "anthropic:phil", "truthfulqa@some/place", "own.jsonl", "syco-bench:mirror"])
def test_suites_by_source(source):
    suite = suite_of(source, letters=False)
    assert isinstance(suite, TwoChoice)
    assert suite.letters is False


def test_another_kind_can_be_registered(monkeypatch, tiny, record):
    class Lengths:
        def requests(self, record):
            return []

        def row(self, record, log_probs):
            return {"id": record.id, "characters": len(record.honest), "asked": len(log_probs)}

    monkeypatch.setitem(suites.SUITES, "embedded", Lengths())
    lm, tea = tiny(), record("tea")
    found = score_items(view_decoder(lm.model), lm.tokenizer, {"own.jsonl": [record("jam")], "embedded": [tea]})
    assert found["embedded"].before == [{"id": tea.id, "characters": len("No to tea."), "asked": 0}]
    assert found["own.jsonl"].before[0]["valid"]
