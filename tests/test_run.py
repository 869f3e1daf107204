"""The whole pipeline on a tiny Gemma 2, through the real command line."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from bad_neurons.artifacts import write_json
from bad_neurons.cli import main
from bad_neurons.plan import plan, read_run_config
from bad_neurons.run import stage_key
from helpers import tiny_run_config

STAGES = ["sae", "probe", "probe-residual", "selection", "tuning", "evaluation"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main(["run", "--config", str(tiny_run_config(folder))]) == 0
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def messages(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """Stage name to what was said of it."""
    rows = (record.message.split(None, 1) for record in caplog.records if record.name == "bad_neurons.run")
    return {row[0]: row[1] for row in rows if row[0] in STAGES}


def again(folder: Path, caplog: pytest.LogCaptureFixture, *options: str) -> dict[str, bool]:
    """Run again and tell of each stage whether it was skipped."""
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(["run", "--config", str(folder / "run.yaml"), *options]) == 0
    return {stage: text.startswith("unchanged") for stage, text in messages(caplog).items()}


def test_results_have_the_published_keys(finished):
    results = read(finished / "run" / "results.json")
    assert results["model"] == str(finished / "model")
    assert set(results["seconds"]) == set(STAGES)
    selection = read(finished / "run" / "selection" / "neurons.json")
    assert results["neurons"] == {
        "axis": "residual",
        "count": sum(len(v) for v in selection["layers"].values()),
        "share": pytest.approx(sum(len(v) for v in selection["layers"].values()) / (2 * 16)),
        "layers": {layer: len(v) for layer, v in selection["layers"].items()},
    }
    sides = results["suites"]["records"]
    for side in ("before", "after"):
        assert sides[side]["n"] == 4  # one test topic of four records
        for measure in ("opinion_shift", "match_rate", "match_rate_letter", "letter_bias"):
            estimate = sides[side][measure]
            assert estimate["ci95"][0] <= estimate["mean"] <= estimate["ci95"][1]
    assert results["side_effects"]["kl_per_token"] > 0
    assert results["side_effects"]["perplexity_before"] != results["side_effects"]["perplexity_after"]


def test_every_piece_is_there(finished):
    for file in ("report.html", "config.yaml", "sae/layer-1/sae_weights.safetensors", "probe/metrics.json", "selection/weights.png",
                 "tuning/delta.safetensors", "tuning/metrics.csv", "evaluation/items.jsonl", "evaluation/answers.jsonl"):  # fmt: skip
        assert (finished / "run" / file).stat().st_size > 0, file
    assert len((finished / "run" / "evaluation" / "items.jsonl").read_text().splitlines()) == 2 * 4


def test_delta_holds_only_the_selected_rows_and_columns(finished):
    layers = read(finished / "run" / "selection" / "neurons.json")["layers"]
    with safe_open(finished / "run" / "tuning" / "delta.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        moved = [name for name in shapes if file.get_tensor(name).abs().max() > 0]
    expected = {}
    for layer, chosen in layers.items():
        k = len(chosen)
        expected |= {f"layers.{layer}.gate_proj": (24, k), f"layers.{layer}.up_proj": (24, k), f"layers.{layer}.down_proj": (k, 24)}
    assert shapes == expected
    assert sorted(moved) == sorted(expected)


def test_checkpoint_is_as_small_as_the_choice(finished):
    checkpoint = torch.load(finished / "run" / "tuning" / "checkpoints" / "last.ckpt", weights_only=True)
    with safe_open(finished / "run" / "tuning" / "delta.safetensors", "pt") as file:
        assert set(checkpoint["state_dict"]) == set(file.keys())


def test_second_run_skips_every_stage(finished, caplog):
    before = (finished / "run" / "tuning" / "delta.safetensors").stat().st_mtime_ns
    assert again(finished, caplog) == dict.fromkeys(STAGES, True)
    assert (finished / "run" / "tuning" / "delta.safetensors").stat().st_mtime_ns == before


def test_changed_option_runs_its_stage_and_what_depends_on_it(finished, tmp_path, caplog):
    folder = copy_of(finished, tmp_path)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["tune"]["model"] = {"lr": 0.002}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert again(folder, caplog) == {s: s not in ("tuning", "evaluation") for s in STAGES}


def test_forced_and_lost_stages_run_again_with_the_same_result(finished, tmp_path, caplog):
    folder = copy_of(finished, tmp_path)
    delta = folder / "run" / "tuning" / "delta.safetensors"
    old = delta.read_bytes()
    delta.unlink()
    skipped = again(folder, caplog)
    assert skipped == {s: s != "tuning" for s in STAGES}  # evaluation reads the same bits again
    assert delta.read_bytes() == old


def test_interrupted_tuning_goes_on_from_its_checkpoint(finished, tmp_path, caplog):
    folder = copy_of(finished, tmp_path)
    tuning = folder / "run" / "tuning"
    whole = (tuning / "delta.safetensors").read_bytes()
    shutil.rmtree(tuning)
    code = interrupt_after_first_epoch(folder)
    assert code == 130
    assert (tuning / "checkpoints" / "last.ckpt").is_file()
    assert not (tuning / "delta.safetensors").exists()
    with caplog.at_level("INFO"):
        again(folder, caplog)
    assert any("goes on from" in record.message for record in caplog.records)
    assert (tuning / "delta.safetensors").read_bytes() == whole


def test_stage_configuration_runs_alone(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    delta = folder / "run" / "tuning" / "delta.safetensors"
    old = delta.read_bytes()
    delta.unlink()
    assert main(["tune", "fit", "--config", str(folder / "run" / "tuning" / "config.yaml")]) == 0
    assert delta.read_bytes() == old
    assert main(["probe", "validate", "--config", str(folder / "run" / "probe" / "config.yaml")]) == 0


def test_an_evaluation_runs_again_when_the_file_of_a_suite_comes_or_changes(tmp_path, monkeypatch):
    """Whether it must be measured, is measured where it is here, or lies in one's home folder."""
    folder = tmp_path / "truthfulqa"
    folder.mkdir()
    monkeypatch.setenv("BAD_NEURONS_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    evaluate = {"suites": ["embedded", "~/own.jsonl"]}
    config = read_run_config(tiny_run_config(tmp_path, records="embedded", evaluate=evaluate))
    keys = []
    for path in (tmp_path / "other.jsonl", tmp_path / "own.jsonl", folder / "TruthfulQA.csv"):
        for text in ("one", "two"):
            path.write_text(text)
            keys.append(stage_key(plan(config, tmp_path / "run")["evaluation"]()))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 1 + 2 + 2


def test_two_stages_never_write_to_one_place(finished):
    planned = plan(read_run_config(finished / "run.yaml"), Path("somewhere"))
    stages = [make() for make in planned.values()]
    outputs = [path for stage in stages for path in stage.outputs]
    assert [stage.name for stage in stages] == list(planned) == STAGES
    assert len(set(outputs)) == len(outputs)


def test_pretrained_saes_need_no_sae_stage(finished):
    config = read_run_config(finished / "run.yaml") | {"sae": "gemma-scope-2b-pt-mlp-canonical:layer_{layer}/width_16k/canonical"}
    stages = plan(config, Path("somewhere"))
    assert list(stages) == STAGES[1:]
    assert stages["probe"]().config["data"]["sae"] == config["sae"]


def test_only_the_way_probe_selects_by_the_probe(finished):
    config = read_run_config(finished / "run.yaml") | {"seed": 5}
    folder, records = Path("somewhere"), Path(config["records"])
    probes = [folder / name / "probe.safetensors" for name in ("probe", "probe-residual")]
    like = Path("other/neurons.json")
    for section, inputs in (
        ({"way": "probe"}, probes),
        ({"way": "gradient"}, [*probes, records]),  # whose layers are the candidates
        ({"way": "gradient", "layers": [2]}, [records]),
        ({"way": "random", "layers": [2], "rule": "same_counts", "like": str(like)}, [records, like]),
    ):
        stage = plan({**config, "select": section}, folder)["selection"]()
        assert list(stage.inputs) == inputs, section
        assert {**stage.config, **section} == stage.config
        assert (stage.config["records"], stage.config["seed"], stage.config["test"]) == (config["records"], 5, 0.2)


def copy_of(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run whose configuration still names the first one's model and records, but its own folder."""
    folder = tmp_path / "copy"
    shutil.copytree(finished / "run", folder / "run")
    config = yaml.safe_load((finished / "run.yaml").read_text())
    config["out"] = str(folder / "run")
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    rename_paths(folder / "run", str(finished / "run"), str(folder / "run"))
    return folder


def rename_paths(run: Path, old: str, new: str) -> None:
    """Stage keys contain paths; stamp the copy as if it had been made in its own place."""
    from bad_neurons import run as module

    for make in plan(read_run_config(run.parent / "run.yaml"), run).values():
        stage = make()
        stamp = run / stage.name / "stage.json"
        content = read(stamp)
        content["key"] = module.stage_key(stage)
        write_json(stamp, content)
        config = run / stage.name / "config.yaml"
        config.write_text(config.read_text().replace(old, new))


def interrupt_after_first_epoch(folder: Path) -> int:
    """Run until the second epoch of tuning starts, then press Ctrl-C."""
    from bad_neurons.tuning.module import NeuronTuner

    def stop(self: NeuronTuner, *_: object) -> None:
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(NeuronTuner, "on_train_batch_start", stop)
    handler = signal.getsignal(signal.SIGINT)  # Lightning leaves it ignored
    try:
        return main(["run", "--config", str(folder / "run.yaml")])
    finally:
        patch.undo()
        signal.signal(signal.SIGINT, handler)
