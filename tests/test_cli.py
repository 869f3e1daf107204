"""The command line: help, and one line with exit status 2 for bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bad_neurons import __version__
from bad_neurons.cli import COMMANDS, main
from bad_neurons.selection.neurons import NeuronSelection, write_neurons
from bad_neurons.testing import save_tiny_model, save_tiny_saes
from helpers import tiny_run_config, write_records


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, records, SAEs and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["run", "--config", str(tiny_run_config(folder))]) == 0
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with; checks status 2 and that there is no traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("bad-neurons: ")]
    assert len(lines) == 1, err
    assert err.rstrip().endswith(lines[0])
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    names = ("probe.safetensors", "neurons.json", "delta.safetensors", "results.json")
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.name in names}


def run_with(made: Path, tmp_path: Path, **changes: object) -> list[str]:
    config = yaml.safe_load((made / "run.yaml").read_text()) | changes
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["run", "--config", str(path), "--out", str(tmp_path / "out")]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bad-neurons {__version__}\n"


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'lightning', 'transformers', 'sae_lens'}"
    code = f"import sys; from bad_neurons.cli import main; main(['--help']); print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("set()\n")


@pytest.mark.parametrize("command", ["sae", "probe", "tune"])
def test_flags_are_flat_and_documented(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "fit", "--help"])
    out = capsys.readouterr().out
    assert "--trainer.devices" in out
    for flag, words in {
        "sae": ("--model.d_sae", "number of features"),
        "probe": ("--model.l2", "penalty on the squared norm"),
        "tune": ("--mask.neurons", "path of"),
    }.items():
        if flag == command:
            assert words[0] in out
            assert words[1] in " ".join(out.split())


def test_unknown_command(capsys):
    assert "no such command; there are run" in refused(["tuen"], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", ', "line 1: not JSON"),
        ('{"prompt": "a", "topic": "t", "sycophantic": "x"}', "line 1: `honest` is missing"),
        ("", "empty"),
        ("\x00\xff", "line 1: not JSON"),
    ],
)
def test_bad_records(made, tmp_path, capsys, content, message):
    (tmp_path / "bad.jsonl").write_text(content, encoding="utf-8")
    line = refused(run_with(made, tmp_path, records=str(tmp_path / "bad.jsonl")), capsys)
    assert message in line
    assert "bad.jsonl" in line


def test_one_label_only(made, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(write_records(tmp_path / "all.jsonl")).read_text().splitlines()]
    (tmp_path / "right.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["person_is_right"]))
    arguments = ["probe", "fit", "--config", str(made / "run" / "probe" / "config.yaml"), "--data.records", str(tmp_path / "right.jsonl")]
    arguments += ["--data.folder", str(tmp_path / "f"), "--model.out", str(tmp_path / "p")]
    assert "1 label(s); the probe needs sycophantic and honest answers" in refused(arguments, capsys)
    assert not (tmp_path / "p").exists()


def test_too_few_topics(made, tmp_path, capsys):
    line = refused(run_with(made, tmp_path, records=write_records(tmp_path / "two.jsonl", topics=2)), capsys)
    assert "2 topics cannot be divided" in line


def test_sae_of_another_width_or_layer(made, tmp_path, capsys):
    wide = save_tiny_saes(tmp_path / "wide", [1, 3], d_in=32)
    probe = [
        "probe",
        "fit",
        "--config",
        str(made / "run" / "probe" / "config.yaml"),
        "--data.folder",
        str(tmp_path / "f"),
        "--model.out",
        str(tmp_path / "p"),
    ]
    assert "reads 32 dimensions, but the model has 16" in refused([*probe, "--data.sae", wide], capsys)
    other = save_tiny_saes(tmp_path / "other", [1])
    assert "the folder has layer-1" in refused([*probe, "--data.sae", other], capsys)
    before = snapshot(made)
    select = ["select", "--config", str(made / "run" / "selection" / "config.yaml")]
    assert "64 features, but the probe has 32 weights" in refused(
        [*select, "--sae", save_tiny_saes(tmp_path / "f64", [1, 3], d_sae=64)], capsys
    )
    assert snapshot(made) == before


def test_neurons_and_delta_of_another_model(made, tmp_path, capsys):
    other = save_tiny_model(tmp_path / "other", "gemma2", seed=5)
    before = snapshot(made)
    tune = ["tune", "fit", "--config", str(made / "run" / "tuning" / "config.yaml"), "--model.model", other]
    assert "they belong to" in refused(tune, capsys)
    evaluate = ["evaluate", "--config", str(made / "run" / "evaluation" / "config.yaml"), "--model", other]
    assert "they belong to" in refused(evaluate, capsys)
    export = ["export", "--model", other, "--delta", str(made / "run" / "tuning" / "delta.safetensors"), "--out", str(tmp_path / "x")]
    assert "they belong to" in refused(export, capsys)
    assert not (tmp_path / "x").exists()
    assert snapshot(made) == before


def test_unknown_model_and_no_network(made, tmp_path, capsys):
    assert "nobody/nothing: not a folder here, and the Hugging Face hub did not give it" in refused(
        run_with(made, tmp_path, model="nobody/nothing"), capsys
    )
    assert "no such packaged model; there are packaged:gemma-3-270m" in refused(run_with(made, tmp_path, model="packaged:gemma-9"), capsys)


def test_unknown_sae_release(made, tmp_path, capsys):
    assert "unknown release or id, or no network" in refused(run_with(made, tmp_path, sae="no-such-release:layer_{layer}"), capsys)


def test_empty_selection(made, tmp_path, capsys):
    select = ["select", "--config", str(made / "run" / "selection" / "config.yaml"), "--out", str(tmp_path)]
    assert "--amount 0.0: a share above 0" in refused([*select, "--amount", "0.0"], capsys)
    empty = NeuronSelection("residual", {1: []}, 16, [1], "m", "d", {})
    write_neurons(tmp_path / "neurons.json", empty)
    tune = ["tune", "fit", "--config", str(made / "run" / "tuning" / "config.yaml"), "--mask.neurons", str(tmp_path / "neurons.json")]
    assert "the selection is empty" in refused(tune, capsys)


def test_layer_that_is_not_there(made, tmp_path, capsys):
    assert "this model has layers 0 to 3" in refused(run_with(made, tmp_path, layers=[1, 9]), capsys)


def test_full_disk_keeps_the_old_delta(made, tmp_path, capsys, monkeypatch):
    before = snapshot(made)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bad_neurons.writing.os.fsync", full)
    tune = [
        "tune",
        "fit",
        "--config",
        str(made / "run" / "tuning" / "config.yaml"),
        "--trainer.max_epochs",
        "1",
        "--trainer.logger",
        "false",
    ]
    line = refused([*tune, "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"], capsys)
    assert "delta.safetensors: cannot be written (No space left on device)" in line
    assert snapshot(made) == before
    assert not list((made / "run" / "tuning").glob(".*partial*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not YAML"),
        ("- a", "expected options by name"),
        ("modle: x", "unknown option 'modle'"),
        ("model: x\nout: y", "`layers` is missing"),
    ],
)
def test_bad_run_configuration(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in refused(["run", "--config", str(tmp_path / "run.yaml")], capsys)


def test_missing_configuration_and_bad_values(made, tmp_path, capsys):
    assert "cannot be read" in refused(["run", "--config", str(tmp_path / "none.yaml")], capsys)
    tune = ["tune", "fit", "--config", str(made / "run" / "tuning" / "config.yaml")]
    assert "--model.lr -1.0: at least 0" in refused([*tune, "--model.lr", "-1"], capsys)
    assert "mode" in refused([*tune, "--mask.mode", "soft"], capsys)
    assert "no such stage" in refused([*run_with(made, tmp_path), "--force", "nothing"], capsys)
    assert "required" in refused(["run"], capsys)
