"""Cells of a comparison on a tiny model: the same numbers again, the right numbers, each kept and not computed twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bad_neurons.artifacts import read_json
from bad_neurons.compare import command
from bad_neurons.compare.command import run_cells
from bad_neurons.compare.setting import Setting, cells_of
from bad_neurons.compare.workbench import Workbench
from bad_neurons.data.splits import load_split
from bad_neurons.errors import UserError
from bad_neurons.formats import CELL
from bad_neurons.models.prompts import tokenize
from bad_neurons.tuning.delta_file import merge_delta, write_delta
from helpers import write_records

TUNE = {
    "model": {"lr": 2e-2, "optimizer": "whitened", "shift_weight": 0.5, "warmup_steps": 0},
    "data": {"target": "neutral", "batch_tokens": 320, "retention_rows": 1, "retention_tokens": 16},
    "trainer": {"max_epochs": 2},
}
CHOICE = {"axis": "intermediate", "rule": "top_fraction", "amount": 0.1, "max_texts": 4}
METHODS: dict[str, dict[str, Any]] = {
    "random": {"select": {"way": "random", **CHOICE}, "tune": TUNE},
    "gradient": {"select": {"way": "gradient", **CHOICE}, "tune": TUNE},
    "same counts": {
        "select": {"way": "random", **CHOICE, "rule": "same_counts", "like": {"way": "gradient", "rule": "top_fraction"}},
        "tune": TUNE,
    },
    "heads": {"select": {"way": "heads", "axis": "heads", "rule": "top_fraction", "amount": 0.5}, "tune": TUNE},
    "whole MLPs": {"select": {"way": "random", **CHOICE, "rule": "all"}, "tune": TUNE},
    "LoRA": {"correction": "lora", "tune": TUNE},
    "full": {"correction": "full", "tune": TUNE},
    "steering": {"correction": "steering", "strengths": [2.0]},
}  # fmt: skip


@pytest.fixture
def setting(tmp_path, tiny_folder) -> Setting:
    records = write_records(tmp_path / "records.jsonl")
    return Setting(tiny_folder(), (1, 2), records, (records,), max_paragraphs=2, dtype="float32")


def cells(names=METHODS, seeds=(0,), examples=(0,), strengths=(0.5, 1.0)):
    return list(cells_of({name: METHODS[name] for name in names}, seeds, examples, strengths))


def untimed(result):
    return {key: value for key, value in result.items() if not key.endswith("_seconds") and key != "digest"}  # which is over them, too


def kept(folder):
    return {path.name: untimed(read_json(path, CELL)) for path in folder.iterdir()}


def test_every_method_with_every_seed_and_number_of_examples():
    found = list(cells_of({"a": {}, "b": {"seeds": [1], "strengths": [3.0]}}, [0, 1], [8, 0], [0.5, 1.0]))
    assert [(c.method, c.seed, c.examples, c.strengths) for c in found] == [
        ("a", 0, 8, (0.5, 1.0)), ("a", 1, 8, (0.5, 1.0)), ("b", 1, 8, (3.0,)),
        ("a", 0, 0, (0.5, 1.0)), ("a", 1, 0, (0.5, 1.0)), ("b", 1, 0, (3.0,)),
    ]  # fmt: skip
    assert all("seeds" not in c.options and "strengths" not in c.options for c in found)
    more = cells_of({"a": {}, "b": {"examples": [32, 8]}}, [0, 1], [8, 0], [1.0])
    assert [(c.method, c.examples, c.seed) for c in more if "examples" not in c.options] == [
        *(("a", 8, 0), ("b", 8, 0), ("a", 8, 1), ("b", 8, 1), ("a", 0, 0), ("a", 0, 1), ("b", 32, 0), ("b", 32, 1)),
    ]


def test_the_same_numbers_whatever_ran_before(setting, tmp_path):
    """All kinds of corrections, in both orders, on workbenches of their own; first that each changes something."""
    assert run_cells(setting, cells(), tmp_path / "one", processes=1) == []
    assert run_cells(setting, cells()[::-1], tmp_path / "other", processes=1) == []
    one = kept(tmp_path / "one")
    assert len(one) == len(METHODS)
    for result in one.values():
        assert all(measured["kl_per_token"] > 0 for measured in result["strengths"])
        (suite,) = result["clean"]
        assert result["strengths"][-1]["items"][suite] != result["clean"][suite]
    assert one == kept(tmp_path / "other")


def test_parallel_processes_give_the_same(setting, tmp_path):
    some = cells(["random", "LoRA"], seeds=(0, 1))
    assert run_cells(setting, some, tmp_path / "one", processes=1) == []
    assert run_cells(setting, some, tmp_path / "two", processes=2) == []
    assert len(kept(tmp_path / "one")) == 4
    assert kept(tmp_path / "one") == kept(tmp_path / "two")


def test_what_is_there_is_not_computed_again(setting, tmp_path, monkeypatch):
    assert run_cells(setting, cells(["random"]), tmp_path / "cells", processes=1) == []
    monkeypatch.setattr(command, "_run_cell", None)  # would fail when called
    assert run_cells(setting, cells(["random"]), tmp_path / "cells", processes=1) == []


def test_names_depend_on_all_that_a_cell_reads(setting, tmp_path):
    (cell,) = cells(["random"])
    names = {cell.path(tmp_path, s.stamp).name for s in (setting, replace(setting, max_items=3), replace(setting, layers=(1,)))}
    names |= {
        c.path(tmp_path, setting.stamp).name for c in (cell._replace(seed=1), cell._replace(examples=8), cell._replace(strengths=(1.0,)))
    }
    assert len(names) == 6
    before = setting.stamp
    write_records(tmp_path / "records.jsonl", topics=7)
    assert setting.stamp != before


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_measures_are_those_of_the_merged_model(setting, tmp_path, strength, monkeypatch):
    """A cell's log-odds and KL against transformers' own forward of a model with the scaled change merged into its weights."""
    bench, (cell,) = Workbench(setting), cells(["gradient"], strengths=(strength,))
    edits = []
    measure = Workbench.measure
    monkeypatch.setattr(Workbench, "measure", lambda self, edit, s: edits.append((edit.selection, edit.deltas())) or measure(self, edit, s))
    (measured,) = bench.run(cell)["strengths"]
    ((selection, deltas),) = edits
    write_delta(tmp_path / "delta.safetensors", selection, {name: strength * delta for name, delta in deltas.items()})
    clean = Workbench(setting).lm
    merged = Workbench(setting).lm
    merge_delta(merged.model, tmp_path / "delta.safetensors")

    def odds(lm, turns, answers):
        sums = []
        for answer in answers:
            ids = tokenize(lm.tokenizer, turns, answer)
            log_p = lm.model(input_ids=torch.tensor([ids.prompt + ids.answer])).logits[0].float().log_softmax(-1)
            sums.append(sum(float(log_p[len(ids.prompt) - 1 + i, token]) for i, token in enumerate(ids.answer)))
        return sums[0] - sums[1]

    records = {record.id: record for record in load_split(setting.records, 0.2, 0.2, 0).test}
    (rows,) = measured["items"].values()
    assert len(rows) == len(records) > 2
    for row in rows:
        record = records[row["id"]]
        assert row["odds"] == pytest.approx(odds(merged, record.prompt, record.scored), abs=2e-3)
        assert row["odds_neutral"] == pytest.approx(odds(merged, record.neutral_prompt, record.scored), abs=2e-3)
    assert any(abs(row["odds"] - odds(clean, records[row["id"]].prompt, records[row["id"]].scored)) > 0.05 for row in rows)


def test_kl_is_not_rounding(setting, tmp_path, tiny_folder):
    """A change that is next to nothing has a KL of next to nothing on a model in bfloat16 as well, which stays as it is."""
    bench, (cell,) = Workbench(replace(setting, dtype="bfloat16")), cells(["random"], strengths=(1e-4, 1.0))
    weights = [parameter.data_ptr() for parameter in bench.lm.model.parameters()]
    little, whole = bench.run(cell)["strengths"]
    assert 0 <= little["kl_per_token"] < 1e-7 < 1e-5 < whole["kl_per_token"]
    assert {parameter.dtype for parameter in bench.lm.model.parameters()} == {torch.bfloat16}
    assert weights == [parameter.data_ptr() for parameter in bench.lm.model.parameters()]


def test_the_model_is_clean_behind_each_cell(setting):
    bench = Workbench(setting)
    ids = torch.arange(3, 40)[None]
    before = bench.lm.model(input_ids=ids).logits.clone()
    for cell in cells():
        bench.run(cell)
        assert torch.equal(bench.lm.model(input_ids=ids).logits, before), cell.method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": {**TUNE, "model": {"lrr": 1}}}, "tune.model: .*lrr"),
        ({"tune": {**TUNE, "data": {"retention_row": 1}}}, "tune.data: .*retention_row"),
        ({"correction": "prompt"}, "method random: correction 'prompt'; expected one of neurons, lora, full, steering"),
        ({"select": {"way": "luck"}}, "method random: way 'luck'; expected one of probe, random"),
        ({"select": {"way": "probe"}}, "--probe: way probe decodes a probe"),
    ],
)
def test_a_bad_cell_fails_alone(setting, tmp_path, options, message):
    bad, good = cells(["random", "gradient"])
    bad = bad._replace(options={**bad.options, **options})
    (failed,) = run_cells(setting, [bad, good], tmp_path / "cells", processes=1)
    with pytest.raises(UserError, match=message):
        raise UserError(failed)
    assert [result["method"] for result in kept(tmp_path / "cells").values()] == ["gradient"]
