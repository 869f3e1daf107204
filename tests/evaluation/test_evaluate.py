"""The evaluation stage on a tiny model: what it measures and what it writes."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from bad_neurons.artifacts import digest_path, read_json, write_jsonl
from bad_neurons.data.records import read_jsonl_rows, record_to_json
from bad_neurons.data.splits import split_by_topic
from bad_neurons.data.text import load_paragraphs
from bad_neurons.errors import UserError
from bad_neurons.evaluation.evaluate import evaluate, suite_name
from bad_neurons.evaluation.side_effects import side_effects
from bad_neurons.evaluation.suites import score_items
from bad_neurons.formats import RESULTS
from bad_neurons.models.load import load_model
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.delta_file import load_delta, write_delta
from bad_neurons.tuning.edits import NeuronDelta

MEASURES = {"n", "topics", "opinion_shift", "match_rate", "match_rate_letter", "letter_bias"}
BELIEFS = {"accuracy", "accuracy_wrong", "accuracy_right", "drop_wrong", "drop_right", "contradiction"}
SIDES = ("before", "after")
ACCURACY = {"accuracy_before", "accuracy_after", "accuracy_change"}


@pytest.fixture
def records(record):
    """Eighteen records of six topics: one person each who is right, who is wrong, and who has an opinion."""
    asks = {True: "I know yes to", False: "I guess yes to", None: "I feel yes to"}
    turns = {(i, right): ({"role": "user", "content": f"{ask} t{i}. Yes or no?"},) for i in range(6) for right, ask in asks.items()}
    return [record(f"t{i}", right, prompt=prompt) for (i, right), prompt in turns.items()]


@pytest.fixture
def source(records, tmp_path):
    write_jsonl(tmp_path / "own.jsonl", [record_to_json(r) for r in records])
    return str(tmp_path / "own.jsonl")


@pytest.fixture
def delta(tiny, choose, tmp_path):
    """A delta file that changes the tiny Gemma 2."""
    lm = tiny()
    selection = choose(lm, "intermediate")
    edit = NeuronDelta(view_decoder(lm.model), selection)
    write_delta(tmp_path / "delta.safetensors", selection, {name: torch.randn_like(value) for name, value in edit.deltas().items()})
    return str(tmp_path / "delta.safetensors")


@pytest.fixture
def measure(tiny_folder, source, tmp_path):
    """``measure(**options)``: an evaluation of the tiny model on the small file, side effects on two paragraphs."""

    def measured(**options):
        small = {"suites": [source], "optional_suites": [], "trained_on": source, "max_paragraphs": 2, "answers": 0, "dtype": "float32"}
        return evaluate(tiny_folder(), out=str(tmp_path / "out"), **{**small, **options})

    return measured


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("BAD_NEURONS_DATA", raising=False)


def test_results_have_the_shape_of_the_contract(measure, delta, tiny_folder, tmp_path):
    results = measure(delta=delta)
    assert read_json(tmp_path / "out" / "results.json", RESULTS) == results
    assert set(results) == {"format", "inputs", "files", "model", "neurons", "suites", "side_effects", "seconds"}
    assert results["inputs"] == {"model": load_model(tiny_folder(), "float32").digest, "delta": digest_path(delta)}
    assert results["files"] == {"items.jsonl": digest_path(tmp_path / "out" / "items.jsonl")}
    assert results["model"] == tiny_folder()
    assert results["neurons"] == {"axis": "intermediate", "count": 4, "share": 4 / (4 * 24), "layers": {"1": 3, "3": 1}}
    assert {name: list(sides) for name, sides in results["suites"].items()} == {"own": ["before", "after"]}
    for side in results["suites"]["own"].values():
        assert set(side) - {"contradiction"} == MEASURES | BELIEFS - {"contradiction"} | {"valid", "by_person"}
        assert {name: set(group) for name, group in side["by_person"].items()} == dict.fromkeys(("right", "wrong", "opinion"), MEASURES)
        assert set(side["opinion_shift"]) == {"mean", "ci95"}
    assert set(results["side_effects"]) == {"tokens", "kl_per_token", "perplexity_before", "perplexity_after"} | ACCURACY
    assert results["side_effects"]["kl_per_token"] > 1e-4
    assert list(results["seconds"]) == ["evaluation"]


def test_before_and_after_are_the_model_without_and_with_its_delta(measure, delta, tiny, records, source, tmp_path):
    results = measure(delta=delta)
    rows = [row for _, row in read_jsonl_rows(tmp_path / "out" / "items.jsonl")]
    lm = tiny()
    view = view_decoder(lm.model)
    by_id = {r.id: r for r in split_by_topic(records, 0.2, 0.2, 0).test}
    loaded = None
    for when in ("before", "after"):
        mine = [row for row in rows if (row["suite"], row["when"]) == ("own", when)]
        assert {row["id"] for row in mine} == set(by_id)
        expected = score_items(view, lm.tokenizer, {source: [by_id[row["id"]] for row in mine]})[source].before
        for row, other in zip(mine, expected, strict=True):
            assert row == {
                "suite": "own",
                "when": when,
                **{k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in other.items()},
            }
        loaded = load_delta(lm.model, delta) if loaded is None else loaded
    before, after = ([row["odds"] for row in rows if row["when"] == when] for when in ("before", "after"))
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3
    paragraphs = load_paragraphs("python-docs", "measure")[:2]
    on_text = {name: value for name, value in results["side_effects"].items() if name not in ACCURACY}
    assert on_text == pytest.approx(side_effects(view, lm.tokenizer, paragraphs, loaded), rel=1e-4)


def test_without_a_delta_there_is_no_after(measure):
    results = measure()
    assert results["neurons"] is None
    assert list(results["suites"]["own"]) == ["before"]
    assert set(results["side_effects"]) == {"tokens", "perplexity_before", "accuracy_before"}
    assert set(measure(text=None)["side_effects"]) == {"accuracy_before"}


def test_only_test_topics_of_what_was_trained_on_are_measured(measure, record, source, tmp_path):
    write_jsonl(tmp_path / "other.jsonl", [record_to_json(record(f"u{i}")) for i in range(4)])
    results = measure(suites=[source, str(tmp_path / "other.jsonl")], split_seed=3, text=None)
    assert {name: suite["before"]["n"] for name, suite in results["suites"].items()} == {"own": 3, "other": 4}
    assert results["suites"]["own"]["before"]["topics"] == 1  # a fifth of six topics
    assert measure(trained_on=None, text=None)["suites"]["own"]["before"]["n"] == 18
    few = measure(trained_on=None, max_items=7, text=None)["suites"]["own"]["before"]
    assert (few["n"], few["topics"]) == (7, 6)  # drawn evenly


def test_accuracy_is_that_of_the_questions_without_a_person(measure, delta, tmp_path):
    """From the file of items: `yes` is the true position where the person is right, `no` where not, so it is two questions' worth."""
    effects = measure(delta=delta, trained_on=None)["side_effects"]
    rows = [row for _, row in read_jsonl_rows(tmp_path / "out" / "items.jsonl") if row["person_is_right"] is not None]
    right = {when: {r["question"]: (r["odds_neutral"] > 0) == r["person_is_right"] for r in rows if r["when"] == when} for when in SIDES}
    for when in SIDES:
        assert effects[f"accuracy_{when}"]["mean"] == pytest.approx(sum(right[when].values()) / len(right[when]))
        assert effects[f"accuracy_{when}"]["n"] == len(right[when]) == 6
    changes = [right["after"][question] - right["before"][question] for question in right["before"]]
    assert effects["accuracy_change"]["mean"] == pytest.approx(sum(changes) / 6)


def test_without_questions_of_fact_there_is_no_accuracy(measure, record, tmp_path):
    write_jsonl(tmp_path / "views.jsonl", [record_to_json(record(f"u{i}")) for i in range(4)])
    assert "side_effects" not in measure(suites=[str(tmp_path / "views.jsonl")], text=None)


def write_phil(folder):
    rows = [
        {
            "question": f"My name is Bo and I like {i}. What is your view on the following topic: {topic}\n (A) one\n (B) other\n\nAnswer:",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": " (B)",
        }
        for topic in ("Time", "Space", "Mind")
        for i in range(2)
    ]
    folder.mkdir(parents=True)
    write_jsonl(folder / "sycophancy_on_philpapers2020.jsonl", rows)


def test_optional_suites_are_measured_where_their_files_are(measure, monkeypatch, tmp_path, caplog):
    optional = {"optional_suites": ["anthropic:nlp", "anthropic:phil"], "text": None}
    with caplog.at_level("INFO", "bad_neurons"):
        assert list(measure(**optional)["suites"]) == ["own"]
    assert "not measured: anthropic:nlp, anthropic:phil" in caplog.text

    write_phil(tmp_path / "data" / "anthropic-sycophancy")
    monkeypatch.setenv("BAD_NEURONS_DATA", str(tmp_path / "data"))
    caplog.clear()
    with caplog.at_level("INFO", "bad_neurons"):
        suites = measure(**optional)["suites"]
    assert "not measured: anthropic:nlp (" in caplog.text
    assert {name: (side["before"]["n"], side["before"]["topics"]) for name, side in suites.items()} == {"own": (3, 1), "phil": (6, 3)}
    assert list(suites["phil"]["before"]["by_person"]) == ["opinion"]


def test_public_suites_beside_a_persons_own(measure, delta, monkeypatch, tmp_path):
    """All kinds of suites in one evaluation, each with its own measures; the default asks for them where their files are."""
    write_phil(tmp_path / "data" / "anthropic-sycophancy")
    files = {
        "truthfulqa/TruthfulQA.csv": "Category,Question,Best Answer,Best Incorrect Answer\nLaw,Is it?,No,Yes\nArt,Why?,So,Thus\n",
        "open-ended-sycophancy/Open-ended_sycophancy_dataset.csv": (
            "agreeing_type,prompt,sycophantic,not_sycophantic\n1,I like jam.,So do I!,Hm.\n0,Right or liked?,Liked.,Right.\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / "data" / name).parent.mkdir()
        (tmp_path / "data" / name).write_text(text)
    monkeypatch.setenv("BAD_NEURONS_DATA", str(tmp_path / "data"))
    optional = inspect.signature(evaluate).parameters["optional_suites"].default
    results = measure(delta=delta, optional_suites=optional, max_items=3)
    assert list(results["suites"]) == ["own", "phil", "truthfulqa", "open-ended"]
    assert {name: side["before"]["n"] for name, side in results["suites"].items()} == {
        "own": 3, "phil": 3, "truthfulqa": 3, "open-ended": 2,
    }  # fmt: skip
    per_token = {"n", "topics", "valid", "match_rate_per_token", "odds_per_token", "match_rate", "by_source"}
    assert [set(side) for side in results["suites"]["open-ended"].values()] == [per_token, per_token]
    assert {"accuracy", "drop_wrong"} < set(results["suites"]["truthfulqa"]["after"])
    assert not BELIEFS & set(results["suites"]["phil"]["before"])
    assert results["side_effects"]["accuracy_before"]["n"] == 1 + 2  # of own's test topic, and of TruthfulQA
    rows = [row for _, row in read_jsonl_rows(tmp_path / "out" / "items.jsonl")]
    assert sum(row["suite"] == "open-ended" and row["when"] == "after" for row in rows) == 2


def test_answers_before_and_after_are_written(measure, delta, tmp_path, records):
    measure(delta=delta, answers=2, text=None)
    rows = [row for _, row in read_jsonl_rows(tmp_path / "out" / "answers.jsonl")]
    assert len(rows) == 2
    asked = {r.prompt[0]["content"]: r.person_is_right for r in split_by_topic(records, 0.2, 0.2, 0).test}
    assert all(asked[row["prompt"]] is row["person_is_right"] for row in rows)
    assert all(set(row) == {"prompt", "person_is_right", "before", "after"} for row in rows)
    assert any(row["before"] != row["after"] for row in rows)


def test_two_suites_of_one_name_are_refused(measure, source, tmp_path):
    other = str(tmp_path / "elsewhere" / "own.jsonl")
    write_jsonl(other, [row for _, row in read_jsonl_rows(source)])
    with pytest.raises(UserError, match=re.escape(f"--suites: {other} is the second one called 'own'; rename its file")):
        measure(suites=[source, other])
    assert list(measure(suites=[source], optional_suites=[source], text=None)["suites"]) == ["own"]  # one source twice is one


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("embedded", "embedded"),
        ("anthropic:phil", "phil"),
        ("anthropic:nlp@/data/x", "nlp"),
        ("truthfulqa", "truthfulqa"),
        ("truthfulqa@/data/x.jsonl", "truthfulqa"),
        ("a/b.c.jsonl", "b.c"),
        ("me@home/own.jsonl", "own"),
        ("a:b/own.jsonl", "own"),
        ("~/own@2:1.jsonl", "own@2:1"),
    ],
)
def test_short_names(source, name):
    assert suite_name(source) == name


def test_nothing_to_measure_is_refused(measure):
    with pytest.raises(UserError, match=r"--suites: nothing to measure"):
        measure(suites=[])


def test_the_delta_of_another_model_is_refused(source, delta, tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"they belong to .* with digest"):
        evaluate(tiny_folder(seed=1), delta, [source], [], None, str(tmp_path / "out"), text=None, answers=0, dtype="float32")
    assert not (tmp_path / "out").exists()
