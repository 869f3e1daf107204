"""``bad-neurons judge`` on a tiny model: from questions to numbers, and again without asking anything twice."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from bad_neurons.artifacts import read_json
from bad_neurons.cli import main
from bad_neurons.errors import UserError
from bad_neurons.evaluation.bootstrap import estimate
from bad_neurons.evaluation.generate import greedy_answers
from bad_neurons.evaluation.judged.stage import judge
from bad_neurons.evaluation.judged.tests import Item, items_of
from bad_neurons.formats import JUDGED
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.delta_file import load_delta, write_delta
from bad_neurons.tuning.edits import NeuronDelta
from judge_server import drop

ROWS = {
    "pickside": [{"statement1": f"tea {i} is best", "statement2": f"coffee {i} is best"} for i in range(3)],
    "mirror": [
        {"topic": f"tea {i}", "stance1": "it wakes", "stance2": "it calms", "userstance1": "It wakes.", "userstance2": "It calms."}
        for i in range(3)
    ],
    "whosaid": [{"statement": f"Tea {i} is hot."} for i in range(3)],
    "delusion": [{"statement": f"Tea {i} speaks to me."} for i in range(4)],
}  # fmt: skip
ANSWERS = 3 * 2 * 3 + 4


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    for test, rows in ROWS.items():
        with open(folder / f"questions_{test}.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(folder)


@pytest.fixture
def delta(tiny, choose, tmp_path):
    """A delta file that changes the tiny Gemma 2 a great deal."""
    lm = tiny()
    selection = choose(lm, "intermediate")
    edit = NeuronDelta(view_decoder(lm.model), selection)
    write_delta(tmp_path / "delta.safetensors", selection, {name: 3 * torch.randn_like(value) for name, value in edit.deltas().items()})
    return str(tmp_path / "delta.safetensors")


@pytest.fixture
def options(tiny_folder, questions, endpoint, tmp_path):
    """Options of a small run with one judge at the endpoint, whose score depends on the text alone."""
    endpoint.act = lambda asked, number: str(sum(asked.first.encode()) % 6)
    return {
        "model": tiny_folder(), "questions": questions, "out": str(tmp_path / "out"), "max_new_tokens": 5, "dtype": "float32",
        "judges": ["m"], "base_url": endpoint.url, "key_variable": "NO_SUCH_KEY",
    }  # fmt: skip


def judged(options):
    return [json.loads(line) for line in (Path(options["out"]) / "judged.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_answers_are_the_models_and_numbers_are_those_of_the_scores(options, endpoint, delta, tiny, tmp_path):
    results = judge(**options, delta=delta)
    assert read_json(tmp_path / "out" / "results.json", JUDGED) == results
    assert results["missing"] == []
    assert list(results["tests"]) == list(ROWS)
    assert results["judges"] == ["m"]
    assert results["neurons"]["count"] == 4
    rows = judged(options)
    assert len(rows) == 2 * ANSWERS

    lm = tiny()
    items = [item for test in ROWS for item in items_of(test, ROWS[test])]
    texts = {"before": generated(lm, items)}
    with load_delta(lm.model, delta):
        texts["after"] = generated(lm, items)
    assert texts["before"] != texts["after"]
    for when, answers in texts.items():
        mine = [row for row in rows if row["when"] == when]
        assert [(row["prompt"], row["answer"]) for row in mine] == [(item.prompt, text) for item, text in zip(items, answers, strict=True)]

    for row in rows:
        expected = float(sum(to_judge(row).encode()) % 6) if row["answer"] else None
        assert row["scores"] == {"m": expected}
        assert row["median"] == expected
    check_numbers(results, rows)


def generated(lm, items):
    return [
        text
        for i in range(0, len(items), 16)
        for text in greedy_answers(lm.model, lm.tokenizer, [it.turns() for it in items[i : i + 16]], 5)
    ]


def to_judge(row):
    """What a judge is asked about a row of ``judged.jsonl``."""
    columns = next(r for r in ROWS[row["test"]] if next(iter(r.values())) == row["topic"])
    return Item(row["test"], row["topic"], row["side"], columns).asked_of_judge(row["answer"]).turns[1]["content"]


def check_numbers(results, rows):
    """The test's numbers over again from the rows."""
    combine = {
        "pickside": lambda a, b: a + b,
        "mirror": lambda a, b: abs(b - a),
        "whosaid": lambda a, b: a - b,
        "delusion": lambda a: a,
    }
    values = {}
    for test, numbers in combine.items():
        for when in ("before", "after"):
            of_topic = {}
            for row in rows:
                if (row["test"], row["when"]) == (test, when):
                    of_topic.setdefault(row["topic"], []).append(row["median"])
            values[test, when] = {t: numbers(*scores) for t, scores in of_topic.items() if None not in scores}
            found = results["tests"][test][when]
            assert found["number"] == estimate(list(values[test, when].values()), list(values[test, when]))
            assert found["number"] == found["by_judge"]["m"]
            assert found["n"] == len(of_topic)
        both = [t for t in values[test, "before"] if t in values[test, "after"]]
        assert results["tests"][test]["change"]["number"] == estimate(
            [values[test, "after"][t] - values[test, "before"][t] for t in both], both
        )


def test_the_same_command_again_asks_nothing_and_writes_the_same(options, endpoint, monkeypatch, tmp_path):
    first, rows = judge(**options), judged(options)
    count = len(endpoint.asked)
    assert max(Counter(asked.first for asked in endpoint.asked).values()) == 1

    monkeypatch.setattr("bad_neurons.evaluation.judged.stage.greedy_answers", lambda *_: pytest.fail("generated again"))
    again = judge(**options)
    assert len(endpoint.asked) == count
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert judged(options) == rows


def test_an_interrupted_generation_gives_the_same_answers(options, monkeypatch, tmp_path):
    judge(**options)
    kept = (tmp_path / "out" / "generated.jsonl").read_text().splitlines(keepends=True)
    rows = judged(options)
    shutil.rmtree(tmp_path / "out")
    batches = []

    def interrupted(model, tokenizer, prompts, length):
        batches.append(len(prompts))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return greedy_answers(model, tokenizer, prompts, length)

    monkeypatch.setattr("bad_neurons.evaluation.judged.stage.greedy_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge(**options)
    assert (tmp_path / "out" / "generated.jsonl").read_text().splitlines(keepends=True) == kept[:16]
    (tmp_path / "out" / "generated.jsonl").write_text("".join(kept[:10]))  # and a batch that was written in part
    judge(**options)
    assert batches == [16, ANSWERS - 16, 16, ANSWERS - 16]
    assert judged(options) == rows


def test_the_median_of_three_judges(options, endpoint, tmp_path):
    offsets = {"a": 0, "b": 1, "c": 3}
    endpoint.act = lambda asked, number: str((sum(asked.first.encode()) + offsets[asked.payload["model"]]) % 6)
    results = judge(**{**options, "judges": ["a", "b", "c"], "tests": ["delusion"]})
    assert results["judges"] == ["a", "b", "c"]
    rows = [row for row in judged(options) if row["answer"]]
    assert len(rows) >= 3
    for row in rows:
        assert row["median"] == sorted(row["scores"].values())[1]
    assert results["tests"]["delusion"]["before"]["number"]["mean"] == pytest.approx(statistics.mean(row["median"] for row in rows))
    by_judge = results["tests"]["delusion"]["before"]["by_judge"]
    assert by_judge["b"]["mean"] == pytest.approx(statistics.mean(row["scores"]["b"] for row in rows))


def test_a_judge_more_costs_its_own_questions_alone(options, endpoint):
    judge(**options)
    before = len(endpoint.asked)
    judge(**{**options, "judges": ["m", "other"]})
    assert {asked.payload["model"] for asked in endpoint.asked[before:]} == {"other"}
    assert len(endpoint.asked) == 2 * before


def test_an_endpoint_that_fails_in_the_middle(options, endpoint):
    endpoint.act = lambda asked, number: "1" if number <= 5 else drop
    with pytest.raises(UserError, match="no reply"):
        judge(**options, attempts=1, at_once=1)
    answered = [asked.first for asked in endpoint.asked[:5]]
    endpoint.act = lambda asked, number: "2"
    asked_before = len(endpoint.asked)
    judge(**options)
    later = [asked.first for asked in endpoint.asked[asked_before:]]
    assert not set(answered) & set(later)
    for row in judged(options):
        if row["answer"]:
            assert row["median"] == (1 if to_judge(row) in answered else 2)


def test_a_local_judge_and_a_part_of_the_questions(options, tiny_folder, tmp_path):
    local = {
        **options,
        "judges": [f"local:{tiny_folder('llama')}"],
        "max_questions": 2,
        "tests": ["whosaid", "delusion"],
        "judge_dtype": "float32",
    }
    results = judge(**local)
    assert results["judges"] == [f"{tiny_folder('llama')} (expected)"]
    assert {test: sides["before"]["n"] for test, sides in results["tests"].items()} == {"whosaid": 2, "delusion": 2}
    assert all(-5 <= row["median"] <= 5 for row in judged(local) if row["answer"])


def test_a_system_prompt(options, tmp_path, tiny_folder):
    options["model"] = tiny_folder("llama")  # it sees all of the prompt, where a tiny Gemma sees the last eight tokens
    judge(**options)
    plain = {(row["test"], row["topic"], row["side"]): row["answer"] for row in judged(options)}
    (tmp_path / "system.txt").write_text("Shout at everybody, always!\n")
    results = judge(**options, system=str(tmp_path / "system.txt"))
    other = {(row["test"], row["topic"], row["side"]): row["answer"] for row in judged(options)}
    assert results["system"] == str(tmp_path / "system.txt")
    changed = {key[0] for key in plain if plain[key] != other[key]}
    assert changed
    assert "delusion" not in changed


def test_an_empty_answer_is_not_judged(options, endpoint, monkeypatch):
    def greedy(model, tokenizer, prompts, length):
        return ["" if i == 0 else f"answer {i}" for i in range(len(prompts))]

    monkeypatch.setattr("bad_neurons.evaluation.judged.stage.greedy_answers", greedy)
    results = judge(**options, tests=["delusion"])
    assert len(endpoint.asked) == 3
    assert results["tests"]["delusion"]["before"]["valid"] == 3 / 4
    assert judged(options)[0]["scores"] == {"m": None}
    monkeypatch.setattr("bad_neurons.evaluation.judged.stage.greedy_answers", lambda m, t, prompts, length: [""] * len(prompts))
    with pytest.raises(UserError, match="no answer at all"):
        judge(**{**options, "max_new_tokens": 6, "tests": ["delusion"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": []}, "--judges .*one judge or more"),
        ({"judges": ["m", "m"]}, "--judges .*each of them once"),
        ({"timeout": 0}, "--timeout 0: above 0"),
        ({"attempts": 0}, "--attempts 0: above 0"),
        ({"at_once": -1}, "--at_once -1: above 0"),
        ({"per_minute": -1}, "--per_minute -1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"tests": []}, "one test"),
        ({"questions": "nowhere"}, "no questions_pickside.csv here"),
        ({"system": "nowhere.txt"}, "nowhere.txt: cannot be read .*--system"),
        ({"base_url": "localhost:80"}, "expected an address"),
        ({"judges": ["local:nobody/nothing"]}, "nobody/nothing: not a folder here"),
    ],
)
def test_mistakes(options, changes, message, endpoint, tmp_path):
    with pytest.raises(UserError, match=message):
        judge(**{**options, **changes})
    assert endpoint.asked == []
    assert (tmp_path / "out").exists() == (
        "local:nobody/nothing" in changes.get("judges", [])
    )  # the others are seen before anything is computed


def test_command_line_and_the_key(options, endpoint, tmp_path, monkeypatch, capfd):
    key = "sk-not-to-be-seen"
    monkeypatch.setenv("MY_KEY", key)
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({**options, "key_variable": "MY_KEY", "per_minute": 100000}))
    assert main(["judge", "--config", str(tmp_path / "judge.yaml"), "--tests", "[pickside, mirror]"]) == 0
    assert {asked.key for asked in endpoint.asked} == {f"Bearer {key}"}
    out, err = capfd.readouterr()
    for words in ("Picking sides", "Mirroring: distance", "Mirroring: move", "Judged by m"):
        assert words in " ".join(out.split())
    assert "m: 100%" in err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"results.json", "judged.jsonl", "generated.jsonl", "verdicts.jsonl"}
    assert all(key not in text for text in (out, err, *(path.read_text(encoding="utf-8") for path in files)))


def test_the_key_cannot_be_typed(options, tmp_path, capfd):
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({**options, "api_key": "sk-not-to-be-seen"}))
    assert main(["judge", "--config", str(tmp_path / "judge.yaml")]) == 2
    assert "api_key" in capfd.readouterr().err


def test_answers_without_a_score_are_named(options, endpoint, caplog):
    endpoint.act = lambda asked, number: "nothing to say" if "Tea 2 speaks" in asked.first else "1"
    with caplog.at_level("WARNING"):
        results = judge(**options, tests=["delusion"])
    assert [(one["judge"], one["test"], one["topic"], one["when"]) for one in results["missing"]] == [
        ("m", "delusion", "Tea 2 speaks to me.", "before")
    ]
    assert "no score by m: delusion, Tea 2 speaks to me., only, before the delta" in caplog.text
    before = len(endpoint.asked)
    endpoint.act = lambda asked, number: "2"
    assert judge(**options, tests=["delusion"])["missing"] == []
    assert len(endpoint.asked) == before + 1
