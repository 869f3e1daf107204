"""Batches for tuning: which tokens are supervised, and that nothing is lost or read twice."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from bad_neurons.artifacts import write_jsonl
from bad_neurons.data.records import read_records
from bad_neurons.data.splits import split_by_topic
from bad_neurons.data.text import load_paragraphs
from bad_neurons.data.tuning import SycophancyDataModule, draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.models.prompts import tokenize
from bad_neurons.testing import tiny_tokenizer

TOPICS = ("moon", "salt", "bees", "rivers", "glass", "bread")


def row(topic, number, right, neutral=True):
    yes, no = f"{topic} {number} is red{'!' * number}", f"{topic} {number} is blue"
    content = {"prompt": f"I think {yes}. Is it?", "topic": topic, "person_is_right": right, "choices": [yes, no]}
    content |= {"honest": f"Yes, {yes}.", "contrarian": "No."} if right else {"honest": f"No, {no}.", "sycophantic": "Yes."}
    return content | ({"neutral_prompt": f"Is {topic} {number} red?"} if neutral else {})


@pytest.fixture
def module(tmp_path, tiny_folder):
    """``module(**options)``: a prepared data module on six topics of four records: right, wrong, right without neutral prompt, wrong."""
    rows = [row(topic, number, right=number % 2 == 0, neutral=number != 2) for topic in TOPICS for number in range(4)]
    write_jsonl(tmp_path / "records.jsonl", rows)

    def prepared(**options):
        made = SycophancyDataModule(
            tiny_folder("llama"), str(tmp_path / "records.jsonl"), **{"batch_tokens": 240, "retention": None, **options}
        )
        made.setup("fit")
        return made

    return prepared


def sides(module):
    return split_by_topic(read_records(module.records), module.validation, module.test, module.split_seed)


def whole(prompt, answer):
    """The ids of a sequence."""
    ids = tokenize(tiny_tokenizer(), prompt, answer)
    return tuple(ids.prompt + ids.answer)


def sequence(rows, place):
    """Token ids on the way to a flat place, and columns of the tokens that follow it: one for each way on."""
    row, column = divmod(place, rows.input_ids.shape[1])
    way = rows.reach()[row, column].nonzero().flatten()
    below = (rows.reach()[row, :, column] & (rows.positions[row] == rows.positions[row, column] + 1)).nonzero().flatten()
    return rows.input_ids[row, way].tolist(), [row * rows.input_ids.shape[1] + c for c in below.tolist()]


def answers_of(rows, weights):
    """All (prompt, answer) pairs of token ids that supervised places, with how many answers each stands for, spell out."""
    starts = [p for p in weights if not any(p in sequence(rows, other)[1] for other in weights)]
    found = []

    def walk(place, prompt, answer):
        following = sequence(rows, place)[1]
        counted = 0
        for place_behind in following:
            token = rows.input_ids.flatten()[place_behind].item()
            counted += walk(place_behind, prompt, (*answer, token)) if place_behind in weights else 1
            if place_behind not in weights:
                found.append((prompt, (*answer, token)))
        ends_inside = int(weights[place]) - counted  # answers that are the beginning of another one
        assert ends_inside >= 0
        return counted

    for start in starts:
        walk(start, tuple(sequence(rows, start)[0]), ())
    return found


def spelled(batch, teacher=False):
    rows, at = (batch.teacher.rows, batch.teacher.at) if teacher else (batch.rows, batch.at[batch.answer > 0])
    return answers_of(rows, dict(zip(at.tolist(), batch.answer[batch.answer > 0].tolist(), strict=True)))


def decoded(pairs):
    return Counter(tiny_tokenizer().decode(answer) for _, answer in pairs)


def all_answers(loader):
    return [pair for batch in loader for pair in spelled(batch)]


def test_answer_positions_are_exactly_the_honest_answer(module):
    made = module()
    for loader, side in ((made.train_dataloader(), 0), (made.val_dataloader(), 1), (made.test_dataloader(), 2)):
        records = sides(made)[side]
        assert decoded(all_answers(loader)) == Counter(" " + record.honest for record in records)
        assert Counter(p + a for p, a in all_answers(loader)) == Counter(whole(r.prompt, r.honest) for r in records)
    assert [len(side) for side in sides(made)] == [16, 4, 4]


def test_targets_are_the_tokens_that_follow(module):
    for batch in module().train_dataloader():
        for place, target, weight in zip(batch.at.tolist(), batch.targets.tolist(), batch.answer.tolist(), strict=True):
            (behind,) = sequence(batch.rows, place)[1]
            assert (batch.rows.input_ids.flatten()[behind].item(), weight) == (target, 1.0)


def test_positions_of_one_row_by_hand(module):
    made = module()
    for batch in made.train_dataloader():
        for prompt, answer in spelled(batch):
            assert tiny_tokenizer().decode(prompt).endswith("Assistant:")
            assert tiny_tokenizer().decode(answer).startswith(" ")


@pytest.mark.parametrize(("target", "honest", "neutral"), [("honest", 1.0, 0.0), ("neutral", 0.0, 1.0), ("mixed", 0.25, 0.75)])
def test_what_is_asked_of_each_place(module, target, honest, neutral):
    """From the records: what each beginning of an answer must be followed by, with which weight, and whom the teacher answers there."""
    made = module(target=target, honest_weight=0.25, retention="python-docs", retention_rows=1, retention_tokens=20)
    expected = {}  # the ids up to a place: [target, ids of the teacher, weight of the honest token, weight of the teacher]

    def begins(prompt, answer):
        ids = tokenize(tiny_tokenizer(), prompt, answer)
        return [tuple(ids.prompt + ids.answer[:n]) for n in range(len(ids.answer) + 1)]

    for record in sides(made).train:
        steps = begins(record.prompt, record.honest) if honest else []
        for here, behind in itertools.pairwise(steps):
            asked = expected.setdefault(here, [0, None, 0.0, 0.0])
            asked[0], asked[2] = behind[-1], asked[2] + honest
        for choice in record.choices if neutral and record.neutral_prompt else ():
            for here, there in list(zip(begins(record.prompt, choice), begins(record.neutral_prompt, choice), strict=True))[:-1]:
                asked = expected.setdefault(here, [0, None, 0.0, 0.0])
                asked[1], asked[3] = there, asked[3] + neutral
    found = {}
    for batch in made.train_dataloader():
        taught = int((batch.neutral > 0).sum())
        assert (batch.neutral[:taught] > 0).all()
        theirs = [tuple(sequence(batch.teacher.rows, place)[0]) for place in batch.teacher.at.tolist()] if taught else []
        assert len(theirs) == taught
        columns = (batch.at, batch.targets, batch.honest, batch.neutral, batch.retained)
        for number, (place, following, *weights) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if not weights[2]:
                found[tuple(sequence(batch.rows, place)[0])] = [following, theirs[number] if number < taught else None, *weights[:2]]
    assert found == expected
    assert len(found) > 200
    both = [asked for asked in found.values() if asked[2] and asked[3]]
    assert bool(both) == (target == "mixed")


@pytest.mark.parametrize(("target", "records", "each"), [("honest", 16, 1), ("neutral", 12, 2)])
def test_batches_hold_every_record_once_an_epoch(module, target, records, each):
    made = module(target=target)
    batches = list(made.train_dataloader())
    assert sum(len(spelled(batch)) for batch in batches) == records * each
    assert all(int(batch.rows.attention_mask.sum()) <= 240 for batch in batches)
    assert len(batches) > 2
    first, again = ([batch.key for batch in loader] for loader in (batches, made.train_dataloader()))
    assert first == again  # the same epoch
    assert len(set(first)) == len(batches)


def test_the_key_follows_what_the_clean_model_is_asked(module):
    keys = {(name, batch.key) for name, options in (("a", {}), ("b", {"seed": 1})) for batch in module(**options).train_dataloader()}
    honest = {batch.key for batch in module().train_dataloader()}
    neutral = {batch.key for batch in module(target="neutral").train_dataloader()}
    assert honest == {key for name, key in keys if name == "a"}
    assert not honest & neutral
    assert honest != {key for name, key in keys if name == "b"}
    mixed = [[batch.key for batch in module(target="mixed", honest_weight=w).train_dataloader()] for w in (0.2, 0.7)]
    assert mixed[0] == mixed[1]  # the weights are no question to the clean model
    assert not set(mixed[0]) & (honest | neutral)


def test_neutral_asks_for_both_positions(module):
    made = module(target="neutral")
    expected = Counter(f" {choice}" for r in sides(made).train if r.neutral_prompt for choice in r.choices)
    assert sum(expected.values()) == 4 * 3 * 2
    assert decoded(all_answers(made.train_dataloader())) == expected
    for batch in made.train_dataloader():
        here, there = spelled(batch), spelled(batch, teacher=True)
        assert Counter(a for _, a in here) == Counter(a for _, a in there)
        assert len(batch.teacher.at) == int((batch.answer > 0).sum())
        tokens = sum(len(answer) for _, answer in here)
        assert batch.answer.sum() == tokens  # every token of every answer counts once
        assert len(batch.teacher.at) < tokens  # what two answers begin with is one place
        for place, teacher in zip(batch.at.tolist(), batch.teacher.at.tolist(), strict=False):  # the same beginning of the answer
            mine, theirs = (tiny_tokenizer().decode(sequence(r, p)[0]) for r, p in ((batch.rows, place), (batch.teacher.rows, teacher)))
            assert mine.split("Assistant:")[1] == theirs.split("Assistant:")[1]


def test_the_teacher_reads_the_neutral_prompt(module):
    made = module(target="neutral")
    expected = Counter(whole(r.neutral_prompt, choice) for r in sides(made).train if r.neutral_prompt for choice in r.choices)
    assert Counter(p + a for batch in made.train_dataloader() for p, a in spelled(batch, teacher=True)) == expected


def test_retention_at_every_fourth_token(module):
    made = module(retention="python-docs", retention_rows=2, retention_tokens=60, retention_stride=4)
    for batch in made.train_dataloader():
        positions = batch.rows.positions.flatten()[batch.at[batch.retained > 0]]
        assert sorted(positions.tolist()) == sorted([*range(0, 59, 4), *range(1, 59, 4)])


def test_retention_is_supervised_in_retained_alone(module):
    made = module(retention="python-docs", retention_rows=2, retention_tokens=60, batch_tokens=400)
    batches, pieces = list(made.train_dataloader()), []
    for batch in batches:
        assert not (batch.answer * batch.retained).any()
        assert ((batch.answer + batch.retained) == 1).all()
        assert batch.retained.sum() == 2 * 59
        assert torch.equal(batch.retained.sort().values, batch.retained)  # answers first
        ends = [p for p in batch.at[batch.retained > 0].tolist() if len(sequence(batch.rows, p)[0]) == 59]
        pieces += [sequence(batch.rows, sequence(batch.rows, p)[1][0])[0] for p in ends]
    assert all((len(piece), piece[0]) == (60, 2) for piece in pieces)
    tokenizer = tiny_tokenizer()
    expected = [tuple(tokenizer(text)["input_ids"][:60]) for text in load_paragraphs("python-docs", "retention", 0)]
    assert Counter(map(tuple, pieces)) == Counter(expected[: 2 * len(batches)])
    assert not any(batch.retained.any() for batch in (*made.val_dataloader(), *made.test_dataloader()))


def test_wrong_persons_only(module):
    made = module(wrong_persons_only=True)
    expected = Counter(" " + r.honest for r in sides(made).train if not r.person_is_right)
    assert sum(expected.values()) == 8
    assert decoded(all_answers(made.train_dataloader())) == expected


def test_fewer_records(module):
    made = module(max_records=8)
    texts = decoded(all_answers(made.train_dataloader()))
    found = Counter(topic for text in texts.elements() for topic in TOPICS if topic in text)
    assert found == dict.fromkeys({r.topic for r in sides(made).train}, 2)
    assert len(all_answers(made.val_dataloader())) == 4  # the other sides stay whole


def test_draw_evenly(tmp_path):
    rows = [row("moon", n, True) for n in range(6)] + [row("salt", n, True) for n in range(2)] + [row("bees", 0, True)]
    write_jsonl(tmp_path / "records.jsonl", rows)
    records = read_records(tmp_path / "records.jsonl")

    def count(limit, seed=0):
        drawn = draw_evenly(records, limit, seed)
        assert len({r.id for r in drawn}) == len(drawn)
        return Counter(r.topic for r in drawn)

    assert count(0) == count(9) == count(99) == {"moon": 6, "salt": 2, "bees": 1}
    assert count(3) == {"moon": 1, "salt": 1, "bees": 1}
    assert count(5) == {"moon": 2, "salt": 2, "bees": 1}
    assert count(7) == {"moon": 4, "salt": 2, "bees": 1}
    assert draw_evenly(records, 5, 1) == draw_evenly(records, 5, 1) != draw_evenly(records, 5, 2)
    assert {r.topic for r in draw_evenly(records, 2, 3)} < {"moon", "salt", "bees"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_tokens": 0}, "--data.batch_tokens 0: at least 1"),
        ({"max_records": -1}, "--data.max_records -1: at least 0"),
        ({"retention_rows": -1}, "--data.retention_rows -1: at least 0"),
        ({"honest_weight": 0.0}, "--data.honest_weight 0.0: above 0 and below 1"),
        ({"honest_weight": 1.0}, "--data.honest_weight 1.0: above 0 and below 1"),
    ],
)
def test_refused_options(module, options, said):
    with pytest.raises(UserError, match=said):
        module(**options)


def test_records_of_which_none_fits_are_refused(tmp_path, tiny_folder):
    write_jsonl(tmp_path / "records.jsonl", [row(topic, 1, right=True, neutral=False) for topic in TOPICS])
    for options, said in (({"target": "neutral"}, "none is fit for --data.target neutral"), ({"wrong_persons_only": True}, "none is fit")):
        with pytest.raises(UserError, match=said):
            SycophancyDataModule(tiny_folder("llama"), str(tmp_path / "records.jsonl"), retention=None, **options).setup("fit")


def test_batches_of_similar_lengths_with_little_padding(tmp_path, tiny_folder):
    rows = [row(topic, number, right=True) | {"prompt": "x" * (40 * (number % 5) + 1)} for topic in TOPICS for number in range(15)]
    write_jsonl(tmp_path / "records.jsonl", rows)
    made = SycophancyDataModule(tiny_folder("llama"), str(tmp_path / "records.jsonl"), batch_tokens=1000, retention=None)
    made.setup("fit")
    masks = [batch.rows.attention_mask for batch in made.train_dataloader()]
    sizes = sorted(int(mask.sum()) for mask in masks)
    assert sizes[-1] <= 1000
    assert sizes[1] > 500  # all but the last that was filled
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding < 0.25  # one sequence a row, at random, is about a half


def test_a_record_longer_than_a_batch_is_a_batch(tmp_path, tiny_folder):
    write_jsonl(tmp_path / "records.jsonl", [row(topic, 1, right=True) for topic in TOPICS])
    made = SycophancyDataModule(tiny_folder("llama"), str(tmp_path / "records.jsonl"), batch_tokens=1, retention=None)
    made.setup("fit")
    assert [int(batch.rows.attention_mask.sum()) > 1 for batch in made.train_dataloader()] == [True] * 4
