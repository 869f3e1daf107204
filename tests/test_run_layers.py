"""The option `layers` of a run by hand, and a run whose layers are chosen greedily, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bad_neurons.artifacts import write_json
from bad_neurons.cli import main
from bad_neurons.errors import UserError
from bad_neurons.formats import LAYERS
from bad_neurons.plan import plan, read_run_config
from bad_neurons.run_layers import LayerChoice, check_layers, share_of_layers
from helpers import tiny_run_config, write_records

BEHIND = ["probe", "probe-residual", "selection", "tuning", "evaluation"]
COMPARED = [*BEHIND[:2], "probes", *BEHIND[2:]]


def choice(value, folder=Path("nowhere"), model="nobody/nothing", pretrained=False, sae_layers=None):
    check_layers(value, "run.yaml")
    return LayerChoice(value, str(model), folder / "layers.json", pretrained, sae_layers)


@pytest.mark.parametrize(
    ("count", "side", "share", "layers"),
    [
        (18, "first", 0.33, [0, 1, 2, 3, 4, 5]),  # 5.94 layers
        (18, "last", 0.5, [9, 10, 11, 12, 13, 14, 15, 16, 17]),
        (30, "last", 0.1, [27, 28, 29]),
        (30, "first", 0.33, list(range(10))),  # 9.9
        (26, "first", 0.01, [0]),  # one at least
        (4, "last", 1, [0, 1, 2, 3]),
    ],
)
def test_shares_by_hand(count, side, share, layers):
    assert share_of_layers(count, side, share) == layers


def test_a_share_is_of_the_configuration_alone(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_text((Path(tiny_folder("gemma3")) / "config.json").read_text())  # there are no weights
    assert choice({"first": 0.5}, model=tmp_path).layers == [0, 1]
    assert choice({"last": 0.26}, model=tmp_path).layers == [3]
    with pytest.raises(UserError, match="nobody/nothing: not a folder here"):
        _ = choice({"first": 0.5}).layers


def test_a_list_stays_as_it_is():
    assert choice([7, 2, 5]).layers == [7, 2, 5]
    assert choice([7, 2, 5]).greedy is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"first": 0.33, "last": 0.33}, r"expected layers such as \[4, 5, 6\], \{first: 0.33\}, \{last: 0.5\} or \{greedy"),
        ({"middle": 0.5}, "expected layers such as"),
        ({}, "expected layers such as"),
        (6, "expected layers such as"),
        ("greedy", "expected layers such as"),
        (None, "expected layers such as"),
        ([], "one number or more from 0 on, each of them once"),
        ([1, 1], "each of them once"),
        ([1, "2"], "one number or more"),
        ([-1], "one number or more from 0 on"),
        ({"first": 0}, "layers.first 0: a share of the model's layers above 0 and at most 1"),
        ({"last": 1.5}, "layers.last 1.5: a share"),
        ({"last": True}, "layers.last True: a share"),
        ({"first": "a third"}, "layers.first 'a third': a share"),
        ({"greedy": 6}, "options of `bad-neurons layers` by name"),
        ({"greedy": {"features": "raw"}}, "layers.greedy.features 'raw': sae or residual"),
    ],
)
def test_other_forms_are_refused(value, said):
    with pytest.raises(UserError, match=f"^run.yaml: .*{said}"):
        check_layers(value, "run.yaml")


def test_greedy_layers_come_from_the_file(tmp_path):
    greedy = choice({"greedy": None}, tmp_path)
    with pytest.raises(UserError, match=r"layers\.json: cannot be read"):
        _ = greedy.layers
    write_json(tmp_path / "layers.json", {"format": LAYERS, "order": [7, 2], "chosen": [2, 7]})
    assert greedy.layers == [2, 7]
    write_json(tmp_path / "layers.json", {"format": LAYERS, "order": [], "chosen": []})
    with pytest.raises(UserError, match="no layer tells the answers apart better than none does; name some"):
        _ = greedy.layers


@pytest.mark.parametrize(
    ("options", "pretrained", "sae_layers", "features", "candidates"),
    [
        ({}, False, None, "residual", [0, 1, 2, 3]),  # SAEs are trained afterwards
        ({"candidates": [1, 2]}, False, None, "residual", [1, 2]),
        ({}, True, None, "sae", [0, 1, 2, 3]),
        ({"features": "residual"}, True, None, "residual", [0, 1, 2, 3]),
        ({}, False, [1, 3], "sae", [1, 3]),
        ({"candidates": [3]}, False, [1, 3], "sae", [3]),
        ({"candidates": [0, 3]}, False, [1, 3], "residual", [0, 3]),  # there will be no SAE for layer 0
        ({"features": "sae", "candidates": [1, 2]}, False, None, "sae", [1, 2]),
    ],
)
def test_features_that_the_greedy_choice_reads(tiny_folder, options, pretrained, sae_layers, features, candidates):
    found = choice({"greedy": options}, model=tiny_folder(), pretrained=pretrained, sae_layers=sae_layers)
    assert found.greedy == {"features": features, **options}
    assert found.on_sae == (features == "sae")
    assert found.candidates == candidates


def stages(folder, **changes):
    """The plan of a tiny run, whose `layers.json` says 1 and 2, stage by stage."""
    config = read_run_config(tiny_run_config(folder, **changes))
    chosen = folder / "run" / "layers" / "layers.json"
    write_json(chosen, {"format": LAYERS, "chosen": [1, 2]})
    return {name: make() for name, make in plan(config, folder / "run").items()}


def test_order_and_layers_of_the_stages(tmp_path):
    on_residual = stages(tmp_path / "a", layers={"greedy": {"budget": 2}}, probe={"model": {"l2": 0.3}, "data": {"pool": "mean"}})
    assert list(on_residual) == ["layers", "sae", *BEHIND]
    assert on_residual["sae"].config["data"]["layers"] == [1, 2]
    assert on_residual["layers"].inputs == (tmp_path / "a" / "records.jsonl",)
    of_the_probe = {"l2": 0.3, "pool": "mean", "features": "residual", "budget": 2}
    assert of_the_probe.items() <= on_residual["layers"].config.items()
    assert not {"sae", "candidates"} & set(on_residual["layers"].config)

    on_sae = stages(tmp_path / "b", layers={"greedy": {"features": "sae", "l2": 0.7}}, probe={"model": {"l2": 0.3}})
    assert list(on_sae) == ["sae", "layers", *BEHIND]
    assert on_sae["sae"].config["data"]["layers"] == [0, 1, 2, 3]
    assert on_sae["layers"].config["l2"] == 0.7
    folders = [tmp_path / "b" / "run" / "sae" / f"layer-{layer}" for layer in range(4)]
    assert on_sae["layers"].inputs == (tmp_path / "b" / "records.jsonl", *folders)
    assert on_sae["probe"].inputs == (tmp_path / "b" / "records.jsonl", *folders[1:3])
    assert on_sae["sae"].outputs == tuple(folder / "cfg.json" for folder in folders)

    pretrained = stages(tmp_path / "c", layers={"greedy": {}}, sae="a-release:layer_{layer}")
    assert list(pretrained) == ["layers", *BEHIND]
    assert {"sae": "a-release:layer_{layer}", "features": "sae"}.items() <= pretrained["layers"].config.items()
    for made in (on_residual, on_sae, pretrained):
        assert made["probe"].config["data"]["layers"] == made["probe-residual"].config["data"]["layers"] == [1, 2]


def test_inputs_are_the_files_that_a_stage_s_own_options_name(tmp_path):
    others = write_records(tmp_path / "others.jsonl")
    made = stages(
        tmp_path / "a", layers={"greedy": {"records": others}}, probes={"records": others, "layers": [0]},
        probe={"data": {"records": others, "layers": [2, 3]}}, sae={"data": {"records": None}}, tune={"data": {"records": others}},
    )  # fmt: skip
    saes = [tmp_path / "a" / "run" / "sae" / f"layer-{layer}" for layer in range(4)]
    assert made["layers"].inputs == (Path(others),)
    assert made["sae"].inputs == ()
    assert made["probe"].inputs == made["probe-residual"].inputs == (Path(others), *saes[2:])
    assert made["probes"].inputs == (Path(others), saes[0])
    assert made["tuning"].inputs[0] == Path(others)
    assert made["evaluation"].inputs[0] == tmp_path / "a" / "records.jsonl"


def test_probes_are_compared_where_their_section_is(tmp_path):
    assert "probes" not in stages(tmp_path / "a")
    compared = stages(tmp_path / "b", probes=None)["probes"]
    run = tmp_path / "b" / "run"
    assert compared.config == {
        "model": str(tmp_path / "b" / "model"), "layers": [1, 3], "sae": str(run / "sae"), "records": str(tmp_path / "b" / "records.jsonl"),
        "validation": 0.2, "test": 0.2, "split_seed": 0, "folder": str(run / "probes" / "features"), "out": str(run / "probes"),
    }  # fmt: skip
    assert compared.inputs == (tmp_path / "b" / "records.jsonl", run / "sae" / "layer-1", run / "sae" / "layer-3")
    assert stages(tmp_path / "c", probes={"splits": 3, "l2": [0.1]})["probes"].config.items() >= {"splits": 3, "l2": [0.1]}.items()


def test_a_section_that_is_no_mapping_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match=r"run.yaml: tune: expected the stage's options by name, not \['fast'\]"):
        read_run_config(tiny_run_config(tmp_path, tune=["fast"]))


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose layers are chosen by AUROC, which is 1 with one layer already, so the second is not taken."""
    folder = tmp_path_factory.mktemp("greedy")
    config = tiny_run_config(folder, layers={"greedy": {"budget": 2}}, probes={"pools": ["max"]})
    assert main(["run", "--config", str(config)]) == 0
    return folder


def again(folder, caplog, *options, **greedy):
    """Stages that ran, of a run with other options of the greedy choice."""
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["layers"]["greedy"] |= greedy
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(["run", "--config", str(folder / "run.yaml"), *options]) == 0
    return [record.message.split()[0] for record in caplog.records if " runs: bad-neurons" in record.message]


def test_only_what_reads_something_new_runs_again(greedy, caplog):
    """In turn: nothing changed; another budget and the same layers; a forced choice; other layers."""
    read = lambda file: json.loads((greedy / "run" / file).read_text())  # noqa: E731
    assert read("layers/layers.json")["chosen"] == [1]
    assert list(read("results.json")["seconds"]) == ["layers", "sae", *COMPARED]
    assert read("probes/probes.json")["layers"] == [1]
    assert read("selection/neurons.json")["candidates"] == [1]
    assert [path.name for path in (greedy / "run" / "sae").glob("layer-*")] == ["layer-1"]
    assert again(greedy, caplog) == []

    before = (greedy / "run" / "report.html").stat().st_mtime_ns
    assert again(greedy, caplog, budget=3) == ["layers"]
    assert read("layers/layers.json")["options"]["budget"] == 3
    assert (greedy / "run" / "report.html").stat().st_mtime_ns > before  # it shows the choice
    assert again(greedy, caplog, "--force", "layers") == ["layers"]

    assert again(greedy, caplog, score="log_loss", budget=2) == ["layers", "sae", *COMPARED]
    assert read("layers/layers.json")["chosen"] == read("selection/neurons.json")["candidates"] == [0, 1]
    assert read("probes/probes.json")["layers"] == [0, 1]
    assert again(greedy, caplog) == []
