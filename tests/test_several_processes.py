"""Two and four processes give what one gives: losses, deltas, SAEs, scores; and going on with several is never having stopped."""

from __future__ import annotations

import json

import ddp
import pytest
from ddp import difference, in_world

from rank_work import moved_in_a_divided_layer

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ddp.write_inputs(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def found(folder):
    """What each process gives in worlds of 1, 2 and 4, by world and rank."""
    return {world: [rank["value"] for rank in in_world(world, ddp.everything, folder, f"world-{world}")] for world in (1, 2, 4)}


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_deltas_are_those_of_one_process(found, world):
    one, every = found[1][0]["tune"], [rank["tune"] for rank in found[world]]
    assert one["batches"] == [13, 5, 5]  # divisible by none: in the last step, one process of two and three of four have nothing
    assert len(one["steps"]) == 2 * 4
    assert set(one["steps"][0]) == {f"train/{name}" for name in ("loss", "ce", "neutral_kl", "kl", "entropy")}
    assert difference(one["steps"][0], one["steps"][-1]) > 0.01  # it learns
    assert max(difference(one["deltas"], rank["deltas"]) for rank in every) < 1e-6
    assert difference(one["deltas"], {name: [[0.0] * len(row) for row in rows] for name, rows in one["deltas"].items()}) > 0.03
    for rank in every:
        assert difference(one["steps"], rank["steps"]) < 1e-6
        assert difference(one["held_out"], rank["held_out"]) < 1e-6
        assert rank["deltas"] == every[0]["deltas"]  # to the bit: what learns must not drift apart


@pytest.mark.parametrize("world", [2, 4])
def test_saes_are_those_of_one_process(found, world):
    one, every = found[1][0]["saes"], [rank["saes"] for rank in found[world]]
    assert any(count > 3 for count in one["silent"]["1"])  # the auxiliary loss has had something to do
    for rank in every:
        assert rank["silent"] == one["silent"]
        assert difference(rank["weights"], one["weights"]) < 1e-5
        assert difference(rank["metrics"], one["metrics"]) < 1e-5
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert rank["weights"] == every[0]["weights"]


@pytest.mark.parametrize("world", [2, 4])
def test_each_item_counts_once(found, folder, world):
    files = [folder / f"world-{n}" / "evaluation" / "items.jsonl" for n in (1, world)]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(rows) == len({(row["id"], row["when"]) for row in rows}) == 2 * 40
    assert files[0].read_bytes() == files[1].read_bytes()
    texts = [(folder / f"world-{n}" / "evaluation" / "answers.jsonl").read_bytes() for n in (1, world)]
    assert texts[0].count(b"\n") == 20  # more than one batch of answers
    assert texts[0] == texts[1]
    one, *every = [rank["measured"] for n in (1, world) for rank in found[n]]
    assert all({**rank, "seconds": 0} == {**one, "seconds": 0} for rank in every)
    assert one["side_effects"]["tokens"] > 2 * 2048  # more than two batches of text


@pytest.mark.parametrize("world", [2, 4])
def test_only_the_first_process_writes(found, folder, world):
    def names(n):
        return sorted(str(path.relative_to(folder / f"world-{n}")) for path in (folder / f"world-{n}").rglob("*") if path.is_file())

    assert names(world) == names(1)
    assert "tuning/delta.safetensors" in names(1)


def test_going_on_with_two_is_never_having_stopped(folder):
    (whole, _), (cut, _) = (in_world(2, ddp.resumed, folder, way) for way in ("whole", "cut"))
    assert len(whole["value"]["steps"]) == 12
    assert len(cut["value"]["steps"]) == 12 - 6  # from the sixth step, the second of the second epoch
    assert cut["value"]["steps"] == whole["value"]["steps"][6:]
    assert cut["value"]["deltas"] == whole["value"]["deltas"]
    files = [folder / way / "delta.safetensors" for way in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_number_of_processes_goes_on_from_the_end_of_an_epoch(found, folder):
    one, place = found[1][0]["tune"], folder / "world-2" / "tuning"
    (resumed,) = in_world(1, ddp.tune, folder, "one-more", 2, str(place / "end-epoch=0.ckpt"))
    assert difference(resumed["value"]["deltas"], one["deltas"]) < 1e-6
    assert difference(resumed["value"]["steps"], one["steps"][4:]) < 1e-6
    with pytest.raises(RuntimeError, match="in the middle of an epoch with 2 processes, but here it is 1; go on with 2, or from a"):
        in_world(1, ddp.tune, folder, "one-more", 2, str(place / "step=3.ckpt"))


def test_a_model_divided_over_two_processes_learns_the_same(folder):
    for found in (rank["value"] for rank in in_world(2, ddp.tune_sharded, folder, "sharded")):
        assert (len(found["whole"]["steps"]), found["whole"]["share"]) == (4, 1.0)
        for name in ("plain", "saving"):
            assert found[name]["share"] == pytest.approx(0.5, abs=0.01)
            assert difference(found[name]["steps"], found["whole"]["steps"]) < 1e-6
            assert difference(found[name]["held_out"], found["whole"]["held_out"]) < 1e-6
            assert difference(found[name]["deltas"], found["whole"]["deltas"]) < 1e-6
    files = [(folder / f"sharded-{name}" / "delta.safetensors").stat().st_size for name in ("plain", "whole")]
    assert files[0] == files[1]


def test_a_bit_that_moves_in_a_divided_layer_is_seen_where_it_is():
    found = [rank["value"] for rank in in_world(2, moved_in_a_divided_layer)]
    assert found == [[[], []], [[], ["1.weight"]]]
