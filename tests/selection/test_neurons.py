"""neurons.json."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bad_neurons.artifacts import write_json
from bad_neurons.errors import UserError
from bad_neurons.selection.neurons import NeuronSelection, read_neurons, write_neurons

CHOSEN = NeuronSelection(
    axis="residual", layers={1: [0, 5, 15], 3: [2]}, size=16, candidates=[0, 1, 3], model_id="tiny", model_digest="ab12",
    rule={"name": "top_p", "amount": 0.2}, scores={1: [0.5, 2.0, 1.0], 3: [0.25]},
)  # fmt: skip


def saved(tmp_path, **changes):
    path = tmp_path / "neurons.json"
    write_json(path, {**CHOSEN.to_json(), **changes})
    return path


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        read_neurons(path)
    assert str(path) in str(caught.value)


def test_counts():
    assert (CHOSEN.count, CHOSEN.share) == (4, 4 / 48)


def test_round_trip(tmp_path):
    write_neurons(tmp_path / "neurons.json", CHOSEN)
    assert read_neurons(tmp_path / "neurons.json") == CHOSEN


def test_the_file(tmp_path):
    content = json.loads(saved(tmp_path).read_text())
    assert content["format"] == "bad-neurons/neurons/2"
    assert content["counts"] == {"1": 3, "3": 1}
    assert content["layers"] == {"1": [0, 5, 15], "3": [2]}
    assert (content["count"], content["share"], content["model"]) == (4, 4 / 48, {"id": "tiny", "digest": "ab12"})


def test_digest_is_of_the_axis_and_the_indices_alone():
    same = replace(CHOSEN, rule={}, scores={}, model_id="other", candidates=[1, 3], layers={3: [2], 1: [0, 5, 15]})
    assert same.digest == CHOSEN.digest
    others = [
        replace(CHOSEN, axis="intermediate"),
        replace(CHOSEN, layers={1: [0, 5], 3: [2]}),
        replace(CHOSEN, layers={2: [0, 5, 15], 3: [2]}),
    ]
    assert len({CHOSEN.digest, *(other.digest for other in others)}) == 4


def test_another_format(tmp_path):
    said = "format 'bad-neurons/neurons/1' is of an older version; expected 'bad-neurons/neurons/2': run `bad-neurons select` again"
    refused(saved(tmp_path, format="bad-neurons/neurons/1"), said)
    refused(saved(tmp_path, format="bad-neurons/neurons/12"), "is of a later version of bad-neurons; .*update bad-neurons")
    refused(saved(tmp_path, format="bad-neurons/delta/1"), "format 'bad-neurons/delta/1'; expected 'bad-neurons/neurons/2', as")


@pytest.mark.parametrize("text", ["[]", "{}", '"neurons"', "null"])
def test_something_else(tmp_path, text):
    (tmp_path / "neurons.json").write_text(text)
    refused(tmp_path / "neurons.json", "expected 'bad-neurons/neurons/2'")


def test_no_json_and_no_file(tmp_path):
    (tmp_path / "neurons.json").write_text('{"format": ')
    refused(tmp_path / "neurons.json", "not JSON")
    refused(tmp_path / "nothing.json", "cannot be read .No such file")


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([5, 0, 15], "sorted"),
        ([0, 0, 5], "different"),
        ([0, 16], "below 16"),
        ([-1, 3], "below 16"),
        (["x"], "invalid literal"),
        (None, "not iterable"),
    ],
)
def test_wrong_indices(tmp_path, indices, said):
    refused(saved(tmp_path, layers={"1": indices}), said)


@pytest.mark.parametrize("layers", [{}, {"1": []}])
def test_an_empty_selection(tmp_path, layers):
    refused(saved(tmp_path, layers=layers), "the selection is empty")


@pytest.mark.parametrize(
    "changes",
    [
        {"axis": "sideways"},
        {"axis": ["residual"]},
        {"size": "many"},
        {"layers": [1]},
        {"layers": {"one": [1]}},
        {"layers": {"-1": [1]}},
        {"model": {}},
        {"candidates": None},
        {"candidates": []},
        {"rule": 3},
    ],
)
def test_incomplete_files(tmp_path, changes):
    refused(saved(tmp_path, **changes), "not a complete neurons.json")


@pytest.mark.parametrize("field", ["axis", "size", "layers", "candidates", "model", "rule"])
def test_missing_fields(tmp_path, field):
    content = CHOSEN.to_json()
    del content[field]
    path = tmp_path / "neurons.json"
    path.write_text(json.dumps(content))
    refused(path, field)
