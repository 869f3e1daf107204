"""The command from its YAML file to tables and plots, on a tiny model."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import yaml

from bad_neurons.cli import main
from bad_neurons.compare import command
from helpers import tiny_run_config

TUNE = {
    "model": {"lr": 2e-2, "optimizer": "whitened", "shift_weight": 0.5, "warmup_steps": 0},
    "data": {"target": "neutral", "batch_tokens": 320, "retention_rows": 1, "retention_tokens": 16},
    "trainer": {"max_epochs": 1},
}
METHODS = {
    "random": {"select": {"way": "random"}},
    "probe": {"select": {"way": "probe"}},
    "residual probe": {"select": {"way": "probe", "probe": "residual"}},
    "steering": {"correction": "steering", "strengths": [1.0, 2.0, 4.0]},
}


@pytest.fixture
def config(tmp_path):
    """``config(**changes)``: path of a comparison's YAML file; records of twelve topics, two seeds, three methods."""

    def write(**changes):
        own = {
            "seeds": [0, 1],
            "examples": [6, 0],
            "strengths": [0.5, 1.0, 4.0],
            "kl_levels": [1e-4],
            "kl_bound": 1e-4,
            "max_paragraphs": 2,
        }
        select = {"axis": "intermediate", "rule": "top_fraction", "amount": 0.1}
        path = tiny_run_config(tmp_path / "tiny", select=select, tune=TUNE, methods=METHODS, compare=own)
        values = yaml.safe_load(path.read_text()) | {"out": str(tmp_path / "compared"), "methods": METHODS}
        path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
        return path

    return write


def compared(path, *options):
    return main(["compare", "--config", str(path), "--processes", "1", *options])


def test_from_yaml_to_tables_and_plots(config, tmp_path, monkeypatch, capsys):
    path = config()
    assert compared(path) == 0
    out = tmp_path / "compared"
    assert len(list((out / "cells").iterdir())) == 2 * 2 * 4
    assert (out / "probe" / "probe.safetensors").is_file()  # some method decodes it
    table = pd.read_parquet(out / "compare.parquet")
    pd.testing.assert_frame_equal(table, pd.read_csv(out / "compare.csv"), check_dtype=False)
    assert set(zip(table["method"], table["examples"], strict=True)) == {(name, n) for name in METHODS for n in (6, 0)}
    for plot in ("frontier", "differences", "efficiency"):
        assert any(path.name.startswith(plot) for path in (out / "plots").iterdir()), plot
    assert "steering" in (out / "compare.md").read_text()
    assert "random" in capsys.readouterr().out
    chosen = {name: {path.name for path in (out / "cells").glob(f"{name}-n0-seed0-*")} for name in ("probe", "residual-probe")}
    one, other = (json.loads((out / "cells" / name).read_text())["strengths"] for names in chosen.values() for name in names)
    assert one != other
    # Each number of the table from the cells themselves.
    cell = next(json.loads(path.read_text()) for path in (out / "cells").iterdir() if path.name.startswith("steering-n6-seed0"))
    last = cell["strengths"][-1]
    assert last["strength"] == 4.0
    monkeypatch.setattr(command, "_run_cell", None)  # the second time there is nothing left to run
    assert compared(path) == 0


def test_means_are_those_of_the_cells(config, tmp_path):
    assert compared(config(), "--only", "random", "--only", "steering") == 0
    out = tmp_path / "compared"
    table = pd.read_csv(out / "compare.csv")
    row = table[(table["method"] == "random") & (table["examples"] == 6) & (table["strength"] == 4.0)].iloc[0]
    by_seed = [json.loads(p.read_text()) for p in (out / "cells").iterdir() if re.match("random-n6-", p.name)]
    assert len(by_seed) == 2
    shifts, kls = [], []
    for cell in by_seed:
        (measured,) = (m for m in cell["strengths"] if m["strength"] == 4.0)
        (rows,) = measured["items"].values()
        shifts += [r["odds"] - r["odds_neutral"] for r in rows]
        kls.append(measured["kl_per_token"])
    found = {name: row[name] for name in table.columns if isinstance(row[name], float)}
    assert any(value == pytest.approx(sum(shifts) / len(shifts), abs=1e-6) for value in found.values()), found
    assert any(value == pytest.approx(sum(kls) / 2, abs=1e-9) for value in found.values()), found


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"methods": {}}, (), "`methods` is missing"),
        ({"methods": {"random": {"selects": {}}}}, (), "methods.random has the option 'selects'; expected correction, select, tune"),
        ({"methods": {"random": 3}}, (), "methods.random is 3"),
        ({"methods": {"random": {"select": {"wayy": "random"}}}}, (), "methods.random.select.wayy: no such option"),
        ({"methods": {"random": {"tune": {"model": {"lrr": 1}}}}}, (), "methods.random.tune.model.lrr: no such option"),
        (
            {"methods": {"random": {"tune": {"data": {"records": "x"}}}}},
            (),
            "methods.random.tune.data.records: the comparison decides this",
        ),
        ({"methods": {"random": {"correction": "lora", "lora": {"rang": 3}}}}, (), "methods.random.lora.rang: no such option"),
        ({"comparison": {}}, (), "unknown option 'comparison'"),
        ({"compare": {"seed": [0]}}, (), "compare.seed: no such option; expected"),
        (
            {"compare": {"reference": "luck", "seeds": [0]}},
            (),
            "compare.reference 'luck': no such method; there are random, probe, residual probe, steering",
        ),
        ({}, ("--only", "luck"), "--only luck: no such method; there are random, probe, residual probe, steering"),
        ({}, ("--processes", "-1"), "--processes -1: 0 or more"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, capsys, changes, options, message):
    assert compared(config(**changes), *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("bad-neurons: ")
    assert not (tmp_path / "compared" / "cells").exists()
