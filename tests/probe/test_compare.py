"""``bad-neurons probes`` from records to its files, with one probe of them by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from bad_neurons.artifacts import read_json
from bad_neurons.cli import main
from bad_neurons.data.readers import load_records
from bad_neurons.formats import PROBES
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import view_decoder
from bad_neurons.probe.divide import divide
from bad_neurons.probe.features import Example, Pooling, extract_features
from bad_neurons.sae.load import SAEs
from bad_neurons.testing import save_tiny_saes
from helpers import write_records
from logistic import reference

SIDES = ["train", "in_domain", "validation", "test"]


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """Arguments of the command on a tiny model with SAEs of two layers, and its folder, in which it has run."""
    folder = tmp_path_factory.mktemp("probes")
    arguments = [
        "probes", "--model", tiny_folder("gemma3"), "--sae", save_tiny_saes(folder / "saes", [1, 3]), "--dtype", "float32",
        "--records", write_records(folder / "records.jsonl", topics=8, per_topic=8), "--folder", str(folder / "features"),
        "--out", str(folder / "out"), "--l2", "[0.1,0.01]",
    ]  # fmt: skip
    assert main(arguments) == 0
    return arguments, folder


def read(folder: Path) -> dict:
    return read_json(folder / "probes.json", PROBES)


def test_every_probe_is_there(made):
    _, folder = made
    found = read(folder / "out")
    assert (found["format"], found["layers"]) == ("bad-neurons/probes/2", [1, 3])  # all that have an SAE
    names = [(p["features"], p["pool"], p["tokens"], tuple(p["layers"])) for p in found["probes"]]
    assert sorted(names) == sorted(
        (f, p, t, layers)
        for f in ("sae", "residual") for p in ("max", "mean") for t in ("answer", "all") for layers in ((1, 3), (1,), (3,))
    )  # fmt: skip
    assert [(d["pool"], d["tokens"], tuple(d["layers"])) for d in found["differences"]] == [n[1:] for n in names if n[0] == "sae"]
    assert all(list(p["scores"]) == SIDES for p in found["probes"])
    # Eight topics of eight questions, of which every second person is right: twelve answers. Two each for validation and test,
    # and two questions (a fifth of eight, rounded) of each other topic in domain.
    [sizes] = found["sizes"]
    assert {side: (s["topics"], s["records"]) for side, s in sizes.items()} == {
        "train": (4, 24), "in_domain": (4, 8), "validation": (2, 16), "test": (2, 16),
    }  # fmt: skip
    assert sizes["test"]["answers"] == 2 * 12
    assert sizes["test"]["majority"] == pytest.approx(8 / 12)


def test_the_table_has_the_same_numbers(made):
    _, folder = made
    found = read(folder / "out")
    with open(folder / "out" / "probes.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == (24 + 12) * 4 * 2
    by_name = {tuple(row[key] for key in ("features", "pool", "tokens", "layers", "side", "measure")): row for row in rows}
    for kind, name in (("probes", None), ("differences", "sae - residual")):
        for probe in found[kind]:
            layers = "all" if len(probe["layers"]) > 1 else str(probe["layers"][0])
            for side, measures in probe["scores"].items():
                for measure, value in measures.items():
                    row = by_name[name or probe["features"], probe["pool"], probe["tokens"], layers, side, measure]
                    assert [float(row[key]) for key in ("value", "low", "high")] == [value["mean"], *value["ci95"]]
                    assert row["l2"] == str(probe.get("l2", ""))
    assert (folder / "out" / "probes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("kind", ["sae", "residual"])
def test_one_probe_by_hand(made, tiny, tmp_path, kind):
    """Features extracted with one pooling, logistic regression on them by L-BFGS, and its scores of each side."""
    arguments, folder = made
    lm, records = tiny("gemma3"), load_records(str(folder / "records.jsonl"))
    division = divide([records], 0.2, 0.2, 0.2, seed=0)
    side_of = {r.id: side for side, side_records in division.items() for r in side_records}
    rows = [(r, a, y) for r in records for a, y in ((r.honest, 0.0), (r.sycophantic, 1.0)) if a is not None]
    ids = [tokenize(lm.tokenizer, r.prompt, answer) for r, answer, _ in rows]
    examples = [Example(i.prompt + i.answer, len(i.prompt)) for i in ids]
    pooling = Pooling("mean", "answer")
    features = extract_features(view_decoder(lm.model), examples, SAEs(arguments[4], [1, 3], 16), [1, 3], [pooling], tmp_path, "")
    x = torch.cat([features.read(pooling, kind, layer) for layer in (1, 3)], 1).double()
    y = torch.tensor([label for *_, label in rows])
    at = {side: torch.tensor([side_of[r.id] == side for r, *_ in rows]) for side in SIDES}
    found = [p for p in read(folder / "out")["probes"] if (p["features"], p["pool"], p["tokens"], p["layers"]) == (kind, *pooling, [1, 3])]
    w, bias = reference(x[at["train"]], y[at["train"]].double(), found[0]["l2"])
    logits = x / x[at["train"]].square().mean().sqrt() @ w + bias
    for side, chosen in at.items():
        scores = found[0]["scores"][side]
        assert scores["auroc"]["mean"] == pytest.approx(float(binary_auroc(logits[chosen], y[chosen].int())), abs=1e-6)
        assert scores["accuracy"]["mean"] == pytest.approx(float(((logits > 0) == (y > 0))[chosen].double().mean()))


def test_the_difference_is_sae_minus_residual(made):
    _, folder = made
    found = read(folder / "out")
    for difference in found["differences"]:
        one, other = (
            p["scores"] for p in found["probes"] if all(p[key] == difference[key] for key in ("pool", "tokens", "layers"))
        )  # SAE, then residual
        for side in SIDES:
            for measure in ("accuracy", "auroc"):
                value = difference["scores"][side][measure]
                assert value["mean"] == pytest.approx(one[side][measure]["mean"] - other[side][measure]["mean"])
                assert value["ci95"][0] <= value["ci95"][1]
    assert any(d["scores"]["test"]["auroc"]["mean"] for d in found["differences"])


def test_a_second_time_reads_the_shards_and_gives_the_same(made, tmp_path, monkeypatch):
    arguments, folder = made
    monkeypatch.setattr("bad_neurons.probe.features.visit_mlp_outputs", None)  # the model would fail
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert read(tmp_path) == read(folder / "out")


def test_residual_alone_several_divisions_and_no_side_in_domain(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    arguments, _ = made
    more = ["--sae", "null", "--layers", "[2]", "--pools", "[max]", "--tokens", "[all]", "--splits", "3", "--in_domain", "0"]
    assert main([*arguments, *more, "--folder", str(tmp_path / "features"), "--out", str(tmp_path)]) == 0
    found = read(tmp_path)
    assert [(p["features"], p["layers"]) for p in found["probes"]] == [("residual", [2])]
    assert found["differences"] == []
    assert [list(sizes) for sizes in found["sizes"]] == [["train", "validation", "test"]] * 3
    out = capsys.readouterr().out
    assert "residual, max, all" in out
    assert "In domain" not in out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--layers", "[1,9]"], "--layers: [9]: this model has layers 0 to 3"),
        (["--layers", "[1,1]"], "--layers [1, 1]: one layer or more, each of them once"),
        (["--pools", "[]"], "--pools, --tokens: one of each or more"),
        (["--tokens", "[all,all]"], "--pools, --tokens: one of each or more, each of them once"),
        (["--l2", "[0.1,0]"], "--l2 [0.1, 0.0]: one penalty or more, each above 0"),
        (["--in_domain", "1"], "--in_domain 1.0: a share from 0 to below 1"),
        (["--splits", "0"], "--splits 0: at least 1"),
        (["--sae_gb", "0"], "--sae_gb 0.0: above 0"),
        (["--sae", "tests"], "--sae tests: no layer-<number> in this folder"),
        (["--test", "0.9"], "cannot be divided"),
    ],
)
def test_bad_options_end_with_one_line(made, tmp_path, capsys, wrong, said):
    arguments, _ = made
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "out"), *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1]
    assert [line for line in lines if line.startswith("bad-neurons: ")] == lines[-1:]
    assert not (tmp_path / "out").exists()
