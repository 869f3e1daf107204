"""The sweep on real cells of a tiny model."""

from __future__ import annotations

import csv

import pytest
import yaml

from bad_neurons.cli import main
from bad_neurons.compare.sweep_command import measures_of
from helpers import tiny_run_config

TUNE = {
    "model": {"lr": 2e-2, "warmup_steps": 0},
    "data": {"target": "neutral", "batch_tokens": 320, "retention_rows": 1, "retention_tokens": 16},
    "trainer": {"max_epochs": 1},
}
SPACE = {"tune.model.lr": {"low": 1e-3, "high": 5e-2, "log": True}, "select.amount": [0.1, 0.3]}


@pytest.fixture
def config(tmp_path):
    """``config(**sweep)``: path of a sweep's YAML file."""

    def write(**own):
        select = {"way": "random", "axis": "intermediate", "rule": "top_fraction", "amount": 0.1}
        sweep = {"space": SPACE, "bounds": {"kl": 1.0}, "trials": 3, "examples": 6, **own}
        path = tiny_run_config(tmp_path / "tiny", select=select, tune=TUNE, compare={"max_paragraphs": 2}, sweep=sweep)
        values = yaml.safe_load(path.read_text()) | {"out": str(tmp_path / "swept")}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def rows(folder):
    with open(folder / "sweep.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def test_a_sweep_goes_on_and_finds_the_best_of_what_it_tried(config, tmp_path):
    path = config()
    assert main(["sweep", "--config", str(path), "--processes", "1", "--trials", "2"]) == 0
    first = rows(tmp_path / "swept")
    assert main(["sweep", "--config", str(path), "--processes", "1"]) == 0
    found = rows(tmp_path / "swept")
    assert ([row["trial"] for row in found], len(first)) == (["0", "1", "2"], 2)
    assert [row["shift"] for row in found[:2]] == [row["shift"] for row in first]
    assert len({row["shift"] for row in found}) == 3
    best = min(found, key=lambda row: float(row["shift"]))
    kept = yaml.safe_load((tmp_path / "swept" / "best.yaml").read_text())
    assert kept["tune"]["model"]["lr"] == pytest.approx(float(best["tune.model.lr"]))
    assert kept["select"]["amount"] == float(best["select.amount"])
    assert (tmp_path / "swept" / "sweep.png").is_file()


def test_two_processes_share_a_study(config, tmp_path):
    assert main(["sweep", "--config", str(config(trials=4)), "--processes", "2"]) == 0
    assert sorted(row["trial"] for row in rows(tmp_path / "swept")) == ["0", "1", "2", "3"]


def test_measures():
    def rows_of(*shifts):
        return [{"valid": True, "odds": shift + 0.5, "odds_neutral": 0.5} for shift in shifts]

    def cell(kl, one, other):
        return {"clean": {"a": rows_of(1.0, 3.0), "b": rows_of(4.0)}, "strengths": [{"kl_per_token": kl, "items": {"a": one, "b": other}}]}

    found = measures_of([cell(0.1, rows_of(0.0, 1.0), rows_of(-1.0)), cell(0.3, rows_of(1.0, 1.0), rows_of(1.0))])
    right = [{"valid": True, "odds": odds, "odds_neutral": 0.5, "person_is_right": True} for odds in (2.0, 3.0, 4.0, -1.0)]
    now = [{**row, "odds": odds} for row, odds in zip(right, (1.0, -2.0, 3.0, -2.0), strict=True)]
    lost = measures_of([{"clean": {"a": right}, "strengths": [{"kl_per_token": 0.0, "items": {"a": now}}]}])
    assert lost["contradicts_right"] == pytest.approx(1 / 3)
    assert found == pytest.approx({"shift_a": (0.25 + 0.5) / 2, "shift_b": 0.25, "shift": (0.375 + 0.25) / 2, "kl": 0.2})


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"space": {}}, "sweep.space: empty"),
        ({"spaces": {}}, "sweep.spaces: no such option"),
        ({"bounds": {"price": 1.0}}, "price is not measured"),
        ({"space": {"tune.model.lrr": [1.0]}}, "sweep.tune.model.lrr: no such option"),
        ({"space": {"tune.model.lr": [-1.0]}}, "no trial was measured; the first failed: --model.lr -1.0: at least 0"),
    ],
)
def test_bad_input_is_one_line(config, capsys, own, message):
    assert main(["sweep", "--config", str(config(**own)), "--processes", "1", "--trials", "1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bad-neurons: ")
    assert message in line
