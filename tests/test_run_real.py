"""A shortened run on the packaged real models: both families, from records to an exported model that transformers loads."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from bad_neurons import load_delta
from bad_neurons.cli import main
from bad_neurons.models.load import load_model
from bad_neurons.models.packaged import PACKAGED_MODELS
from helpers import write_records

pytestmark = pytest.mark.real


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(module) for module in PACKAGED_MODELS[name].modules)


@pytest.mark.parametrize(("name", "layers", "width"), [("gemma-3-270m", [5, 6], 640), ("smollm2-135m-instruct", [12, 13], 576)])
def test_shortened_pipeline(name, layers, width, tmp_path):
    if not installed(name):
        pytest.skip(f"{PACKAGED_MODELS[name].install} was not run")
    config = {
        "out": str(tmp_path / "run"),
        "model": f"packaged:{name}",
        "layers": layers,
        "records": write_records(tmp_path / "records.jsonl"),
        "sae": {"model": {"d_sae": 64, "k": 8}, "data": {"max_tokens": 2000, "batch_size": 128}, "trainer": {"max_epochs": 2}},
        "select": {"axis": "residual", "rule": "top_p", "amount": 0.2},
        "tune": {
            "model": {"lr": 2e-3, "kl_on": "retention"},
            "data": {"target": "neutral", "batch_tokens": 256, "retention_rows": 1, "retention_tokens": 16},
            "trainer": {"max_epochs": 3, "limit_val_batches": 0},
        },
        "evaluate": {"optional_suites": [], "max_paragraphs": 2, "answers": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", "--config", str(tmp_path / "run.yaml")]) == 0

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(math.isfinite(results["suites"]["records"][when]["opinion_shift"]["mean"]) for when in ("before", "after"))
    with open(tmp_path / "run" / "tuning" / "metrics.csv", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["train/neutral_kl"]]
    first, last = ([float(row["train/neutral_kl"]) for row in rows if row["epoch"] == epoch] for epoch in ("0", "2"))
    assert len(first) == len(last) > 1
    assert sum(last) < 0.7 * sum(first)  # the same batches: it learns what it is asked to
    assert 0 < results["side_effects"]["kl_per_token"] < 0.5
    selection = json.loads((tmp_path / "run" / "selection" / "neurons.json").read_text())
    assert selection["size"] == width
    assert 0.001 < results["neurons"]["share"] < 0.2
    assert (tmp_path / "run" / "report.html").stat().st_size > 20_000

    delta = str(tmp_path / "run" / "tuning" / "delta.safetensors")
    assert main(["export", "--model", f"packaged:{name}", "--delta", delta, "--out", str(tmp_path / "exported")]) == 0
    live, exported = load_model(f"packaged:{name}", "float32"), load_model(str(tmp_path / "exported"), "float32")
    ids = torch.tensor([live.tokenizer("I think that whales are fish. Are they?")["input_ids"]])
    with torch.no_grad(), load_delta(live.model, delta) as put_on:
        corrected = live.model(input_ids=ids).logits
        with put_on.disabled():
            clean = live.model(input_ids=ids).logits
        merged = exported.model(input_ids=ids).logits
    assert (corrected - clean).abs().max() > 0.01
    torch.testing.assert_close(merged, corrected, rtol=1e-3, atol=2e-3)


def test_the_quickstart_names_a_packaged_model():
    config = yaml.safe_load((Path(__file__).parent.parent / "configs" / "quickstart.yaml").read_text())
    assert config["model"].removeprefix("packaged:") in PACKAGED_MODELS
