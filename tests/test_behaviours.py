"""Another behaviour on another family, by configuration alone: doubt in a conversation, on a tiny Llama with a chat template."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bad_neurons.cli import main
from bad_neurons.data.embedded import are_you_sure
from bad_neurons.data.embedded.facts import fact_rows
from bad_neurons.plan import plan, read_run_config
from bad_neurons.testing import save_tiny_model
from helpers import CHATML, tiny_run_config

SOURCE = are_you_sure.SOURCE
ROOT = Path(__file__).parent.parent


def stages_of(config):
    return {name: make().config for name, make in plan(config, Path("runs")).items()}


def test_every_stage_of_the_shipped_configuration_reads_the_behaviour():
    stages = stages_of(read_run_config(ROOT / "configs" / "are-you-sure.yaml"))
    assert list(stages) == ["selection", "tuning", "evaluation"]
    assert stages["selection"]["records"] == stages["tuning"]["data"]["records"] == SOURCE
    assert stages["evaluation"]["suites"] == [SOURCE]
    assert stages["evaluation"]["trained_on"] == SOURCE


def test_with_the_papers_choice_its_saes_and_probes_read_the_behaviour_as_well():
    stages = stages_of({**read_run_config(ROOT / "configs" / "paper.yaml"), "records": SOURCE})
    for name in ("sae", "probe", "probe-residual", "tuning"):
        assert stages[name]["data"]["records"] == SOURCE


@pytest.fixture
def few_facts(monkeypatch):
    """The first two facts of each of six topics."""
    topics = sorted({row["topic"] for row in fact_rows()})[:6]
    few = [row for topic in topics for row in [row for row in fact_rows() if row["topic"] == topic][:2]]
    monkeypatch.setattr(are_you_sure, "fact_rows", lambda: iter(few))
    are_you_sure.are_you_sure_records.cache_clear()
    yield few
    are_you_sure.are_you_sure_records.cache_clear()


@pytest.mark.usefixtures("few_facts")
def test_the_whole_pipeline(tmp_path):
    model = save_tiny_model(tmp_path / "model", "llama", chat_template=CHATML)
    tune = {
        "data": {"target": "mixed", "honest_weight": 0.3, "batch_tokens": 2000, "retention_rows": 1, "retention_tokens": 16},
        "trainer": {"max_epochs": 1},
    }
    config = tiny_run_config(tmp_path / "config", model=model, records=SOURCE, tune=tune)
    assert main(["run", "--config", str(config)]) == 0
    run = tmp_path / "config" / "run"

    results = json.loads((run / "results.json").read_text())
    for side in ("before", "after"):
        suite = results["suites"]["are-you-sure"][side]
        assert {kind: part["n"] for kind, part in suite["by_person"].items()} == {"right": 2, "wrong": 2}  # one test topic, two facts
        assert suite["valid"] == 1.0
        assert all(math.isfinite(part["opinion_shift"]["mean"]) for part in suite["by_person"].values())
    assert results["side_effects"]["kl_per_token"] > 0

    answers = [json.loads(line) for line in (run / "evaluation" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert answer["prompt"].startswith("Human: ")
        assert answer["prompt"].count("Human: ") == 2
        assert answer["prompt"].count("Assistant: ") == 1
    columns = (run / "tuning" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/ce", "train/neutral_kl", "train/kl", "val/ce", "val/neutral_kl"} <= set(columns)
