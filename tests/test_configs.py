"""Every shipped YAML goes through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bad_neurons.cli import main
from bad_neurons.compare.command import check_options, methods_of, options_of
from bad_neurons.compare.sweep import nested, read_space
from bad_neurons.plan import Stage, merged, plan, read_run_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
STAGE_COMMANDS = {
    "sae": ["sae", "fit"],
    "layers": ["layers"],
    "probe": ["probe", "fit"],
    "probes": ["probes"],
    "select": ["select"],
    "tune": ["tune", "fit"],
    "evaluate": ["evaluate"],
    "judge": ["judge"],
    "judge-agreement": ["judge-agreement"],
    "export": ["export"],
}
SECTIONS = ("compare", "methods", "sweep")  # what a comparison or a sweep has beside a run's own
COMPARISONS = [path for path in CONFIGS if set(yaml.safe_load(path.read_text())) & set(SECTIONS)]
RUNS = [path for path in CONFIGS if path.stem not in STAGE_COMMANDS and path not in COMPARISONS]


def parsed(words: list[str], config: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """What the command line makes of a configuration: `--print_config` parses and checks every option, and stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def given(config: dict, result: dict, path: str = "") -> list[tuple[str, object, object]]:
    """Options of `config` that came out otherwise."""
    wrong = []
    for key, value in config.items():
        if isinstance(value, dict):
            wrong += given(value, result[key], f"{path}{key}.")
        elif key != "callbacks" and result[key] != value:
            wrong.append((path + key, value, result[key]))
    return wrong


def test_the_list_is_complete():
    assert {path.stem for path in CONFIGS} >= {*STAGE_COMMANDS, "quickstart", "gemma-2-2b", "gemma-2-9b", "smollm2"}
    assert len(RUNS) >= 4


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem in STAGE_COMMANDS], ids=lambda p: p.stem)
def test_stage_configuration(path, capsys):
    assert given(yaml.safe_load(path.read_text()), parsed(STAGE_COMMANDS[path.stem], path, capsys)) == []


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_comparison_configuration(path, tmp_path, capsys):
    config = read_run_config(path, SECTIONS)
    for name, stage in plan({key: value for key, value in config.items() if key not in SECTIONS}, tmp_path).items():
        if name in ("sae", "probe", "probe-residual"):
            made = stage()
            assert given(made.config, parsed(list(made.command), written(made, tmp_path), capsys)) == [], name
    if "sweep" in config:
        options = merged(
            {"select": config["select"], "tune": config["tune"]}, nested(dict.fromkeys(read_space(config["sweep"]["space"], "space")))
        )
        check_options(options, str(path))
    else:
        options_of(config, methods_of(config, str(path)), str(path))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_run_configuration(path, tmp_path, capsys):
    for make in plan(read_run_config(path), tmp_path).values():
        stage = make()
        assert given(stage.config, parsed(list(stage.command), written(stage, tmp_path), capsys)) == [], stage.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_opening_lines_say_how_to_run_it(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in head if "bad-neurons" in line]
    assert len(commands) >= 1
    assert all(f"configs/{path.name}" in line or "\\" in line for line in commands if " --config" in line)
    assert any(line.startswith("# Needs:") for line in head)


def test_misspelt_option_is_named(tmp_path, capsys):
    path = tmp_path / "tune.yaml"
    path.write_text((ROOT / "configs" / "tune.yaml").read_text().replace("alpha: 10.0", "alhpa: 10.0"))
    assert main(["tune", "fit", "--config", str(path)]) == 2
    assert "alhpa" in capsys.readouterr().err


def written(stage: Stage, folder: Path) -> Path:
    path = folder / f"{stage.name}.yaml"
    path.write_text(yaml.safe_dump(stage.config))
    return path
