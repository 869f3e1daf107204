"""Formats, digests, and what a run, a cache and a checkpoint do with what they cannot rely on."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from bad_neurons import formats
from bad_neurons.artifacts import is_whole, read_json, write_json, write_tensors
from bad_neurons.checkpoints import SealedCheckpoints, digest_state
from bad_neurons.compare.results import read_cell
from bad_neurons.errors import UserError
from bad_neurons.plan import Stage
from bad_neurons.run import run_stage
from bad_neurons.sealed import Format, sealed, unsealed
from bad_neurons.shards import fill_shards
from bad_neurons.tuning.clean_cache import CleanCache, CleanPass

THING = Format("bad-neurons/thing/2", "bad-neurons make")


def every_format():
    return [value for value in vars(formats).values() if isinstance(value, Format)]


def test_names_differ_and_have_a_version():
    assert len({form.rpartition("/")[0] for form in every_format()}) == len(every_format()) >= 15
    assert all(form.split("/")[0] == "bad-neurons" and form.split("/")[2].isdecimal() for form in every_format())


def test_a_seal_is_of_the_content_as_json_has_it():
    content = {"format": THING, "by layer": {10: (1, 2), 9: [0.1]}}
    assert unsealed(json.loads(json.dumps(sealed(content))), "here") == {"format": THING, "by layer": {"10": [1, 2], "9": [0.1]}}
    assert sealed(sealed(content)) == sealed(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": 2}, "damaged or changed since it was written"),
        ({"b": 2}, "damaged or changed"),
        ({"digest": None}, "damaged or changed"),
        ({"format": "bad-neurons/thing/1"}, "'bad-neurons/thing/1' is of an older version; .*: run `bad-neurons make` again"),
        ({"format": None}, "None is of an older version"),
        ({"format": "bad-neurons/thing/3"}, "is of a later version of bad-neurons; .*: update bad-neurons"),
        ({"format": "bad-neurons/other/2"}, "format 'bad-neurons/other/2'; expected 'bad-neurons/thing/2', as `bad-neurons make`"),
        ({"format": 7}, "format 7; expected"),
    ],
)
def test_what_is_not_as_it_was_written(tmp_path, changes, message):
    path = tmp_path / "thing.json"
    write_json(path, {"format": THING, "a": 1})
    assert read_json(path, THING) == {"format": THING, "a": 1}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message) as caught:
        read_json(path, THING)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_damaged_shard_is_made_again_and_no_other(tmp_path, caplog):
    made = []

    def compute(number):
        made.append(number)
        return {"a": torch.full((4,), float(number))}

    paths = fill_shards(tmp_path, "shard", 3, "k", compute, "shards")
    whole = [path.read_bytes() for path in paths]
    paths[1].write_bytes(whole[1][:-1] + bytes([whole[1][-1] ^ 1]))
    assert fill_shards(tmp_path, "shard", 3, "k", compute, "shards") == paths
    assert made == [0, 1, 2, 1]
    assert [path.read_bytes() for path in paths] == whole
    assert "shard-00001.safetensors: damaged or changed since it was written" in caplog.text
    fill_shards(tmp_path, "shard", 3, "other", compute, "shards")
    assert made == [0, 1, 2, 1, 0, 1, 2]


def test_a_clean_pass_of_another_batch_or_damaged_is_a_miss(tmp_path, caplog):
    clean = CleanPass(torch.ones(3, 4), torch.zeros(2, 4))
    kept = CleanCache(0, tmp_path, "model-a")
    for key in ("a", "b"):
        kept.put(key, clean)
    one, other = (kept._path(key) for key in ("a", "b"))
    assert CleanCache(0, tmp_path, "model-a").get("a") is not None
    one.write_bytes(other.read_bytes())
    assert CleanCache(0, tmp_path, "model-a").get("a") is None
    assert "a clean pass of another batch or model" in caplog.text
    other.write_bytes(other.read_bytes()[:-3])
    assert CleanCache(0, tmp_path, "model-a").get("b") is None
    assert other.name in caplog.text


def test_a_cell_that_is_damaged_or_of_another_name_is_not_done(tmp_path, caplog):
    path = tmp_path / "random-n8-seed0-ab.json"
    write_json(path, {"format": formats.CELL, "key": path.stem, "method": "random"})
    assert read_cell(path)["method"] == "random"
    other = tmp_path / "probe-n8-seed0-cd.json"
    other.write_bytes(path.read_bytes())
    assert read_cell(other) is None
    assert "the result of another cell" in caplog.text
    path.write_text(path.read_text().replace('"random"', '"randem"'))
    assert read_cell(path) is None
    path.write_text('{"method": "random"}')  # from before cells had a format
    assert read_cell(path) is None
    assert read_cell(tmp_path / "none.json") is None


def test_a_stage_whose_output_changed_runs_again(tmp_path, monkeypatch, caplog):
    out = tmp_path / "made" / "thing.json"
    calls = []

    def call(stage, folder, resume):
        calls.append(stage.name)
        write_json(out, {"a": 1})

    monkeypatch.setattr("bad_neurons.run._call", call)
    stage = Stage("made", ("select",), {"model": "m"}, (), (out,))
    assert [run_stage(stage, tmp_path, False)[1] for _ in range(2)] == [True, False]
    out.write_text(out.read_text().replace("1", "2", 1))
    assert [run_stage(stage, tmp_path, False)[1] for _ in range(2)] == [True, False]
    assert "thing.json: damaged or changed since the stage wrote it; the stage runs again" in caplog.text
    (tmp_path / "made" / "stage.json").write_text("{")
    assert [run_stage(stage, tmp_path, False)[1] for _ in range(2)] == [True, False]
    assert run_stage(replace(stage, config={"model": "n"}), tmp_path, False)[1]
    assert calls == ["made"] * 4


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


STATE = {
    "state_dict": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, "epoch": 3,
    "loops": {"x": [1, 2.5, None, "y"]},
    "optimizer_states": [OrderedDict(state={0: {"exp_avg": torch.zeros(0, 4), "step": torch.tensor(3.0)}})],
}  # fmt: skip


def test_checkpoints_come_back(tmp_path):
    io = SealedCheckpoints()
    io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    found = io.load_checkpoint(tmp_path / "a.ckpt")
    assert set(found) == set(STATE)
    assert torch.equal(found["state_dict"]["a"], STATE["state_dict"]["a"])
    assert digest_state(found) == digest_state(STATE)


def test_every_part_of_a_checkpoint_counts():
    import copy

    def changed(change):
        state = copy.deepcopy(STATE)
        change(state)
        return digest_state(state)

    changes = [
        lambda s: s["state_dict"]["a"][0].add_(1e-6), lambda s: s.update(epoch=4), lambda s: s["loops"]["x"].append(None),
        lambda s: s["optimizer_states"][0]["state"][0].update(step=torch.tensor(4.0)), lambda s: s.pop("loops"), lambda s: s.update(more=1),
        lambda s: s["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(0, 5)), lambda s: s["state_dict"].update(b=torch.ones(2)),
    ]  # fmt: skip
    assert len({digest_state(STATE), *map(changed, changes)}) == 1 + len(changes)


def test_checkpoints_that_are_none(tmp_path):
    io, path = SealedCheckpoints(), tmp_path / "a.ckpt"
    io.save_checkpoint(STATE, path)
    whole = path.read_bytes()
    at = whole.index(STATE["state_dict"]["a"].numpy().tobytes())
    spoilt = {
        "damaged or changed since it was saved": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "cannot be read as a checkpoint": whole[:400],
    }
    for message, content in spoilt.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            io.load_checkpoint(path)
    torch.save(STATE, path)  # without a seal
    with pytest.raises(UserError, match="format None; expected 'bad-neurons/checkpoint/1'"):
        io.load_checkpoint(path)
    with pytest.raises(UserError, match=r"cannot be read as a checkpoint \(FileNotFoundError"):
        io.load_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_with_code_does_not_run(tmp_path):
    path, ran = tmp_path / "a.ckpt", tmp_path / "ran"
    torch.save({"state_dict": Evil(ran)}, path)
    torch.load(path, weights_only=False)
    assert ran.exists()  # it would
    ran.rmdir()
    for asked in (None, False, True):
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            SealedCheckpoints().load_checkpoint(path, weights_only=asked)
    assert not ran.exists()


def test_is_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    assert not is_whole(path, THING, "k")
    write_tensors(path, {"a": torch.ones(2)}, {"format": THING, "key": "k"})
    assert is_whole(path, THING, "k")
    assert not is_whole(path, THING, "other")
