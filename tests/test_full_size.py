"""The benchmark for GPUs on a tiny model: that it runs, that contenders do the same work, and what it says when one cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import full_size
import pytest
import torch
from full_size import SIZES, Meter, contenders, make_work, measure

# peft 0.21 asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def work():
    """The tiny model with its data on the processor."""
    return make_work(SIZES["tiny"], [1, 2, 4], 1024, torch.device("cpu"))


def state(model):
    """Everything that a contender might leave behind: weights, what learns, hooks."""
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    return weights, [p.requires_grad for p in model.parameters()], [len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_script(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    out = tmp_path / "folder" / "tiny.json"
    command = [sys.executable, full_size.__file__, "--model", "tiny", "--device", device, "--rounds", "1", "--out", str(out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=one_thread)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content) == {"model", "config", "dtype", "layers", "batch_tokens", "weights_bytes", "device", "at", "results"}
    assert content["device"]["name"]
    assert content["device"]["versions"]["torch"] == torch.__version__
    assert content["weights_bytes"] == 4 * (512 * 64 + 6 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 96 + 4 * 64) + 64)
    results = content["results"]
    assert {kind: set(rows) for kind, rows in results.items()} == {kind: set(rows) for kind, rows in contenders().items()}
    for rows in results.values():
        for name, row in rows.items():
            assert {"seconds", "seconds_all", "rate", "peak_bytes", "base_bytes", "units"} <= set(row)
            assert row["seconds"] > 0
            assert row["rate"] == row["units"] / row["seconds"]
            assert name in done.stdout
    same_work(results)


def same_work(results):
    """Contenders that do the same work give the same numbers."""
    tuning = results["tuning"]
    start = tuning["bad-neurons, first epoch"]["loss_at_step_0"]
    assert start > 1
    assert all(row["loss_at_step_0"] == pytest.approx(start, rel=1e-5) for row in tuning.values())
    # The same neurons learn in both forms, so the losses stay together; LoRA's do not.
    ours, theirs = (tuning[name] for name in ("bad-neurons, clean pass cached", "masked matrices + second model, logits where needed"))
    assert ours["loss_now"] == pytest.approx(theirs["loss_now"], rel=1e-5)
    lora = next(row for name, row in tuning.items() if "LoRA" in name and "needed" in name)
    assert abs(ours["loss_now"] - lora["loss_now"]) > 1e-4
    assert ours["trained"] == 3 * 3 * 96 * 2  # layers, matrices, m, indices
    assert theirs["trained"] == 3 * 3 * 96 * 64
    for places in full_size.HEAD_PLACES:
        dense, chunked = (results["head"][f"{kind}, {places} places"]["loss"] for kind in ("dense", "chunked"))
        assert chunked == pytest.approx(dense, rel=1e-5)
    kept, ours = results["extraction"].values()
    assert ours["mean_feature"] == pytest.approx(kept["mean_feature"], rel=1e-5)
    assert ours["mean_feature"] > 0
    apart, ours = results["evaluation"].values()
    assert abs(ours["before"] - ours["after"]) > 1e-3
    assert (ours["before"], ours["after"]) == pytest.approx((apart["before"], apart["after"]), rel=1e-6)


@pytest.mark.parametrize("kind", ["tuning", "extraction", "evaluation"])
def test_contenders_leave_the_model_as_it_was(kind, work):
    before = state(work.model)
    for contender in contenders()[kind].values():
        with contender(work) as run:
            run()
        after = state(work.model)
        assert after[1:] == before[1:]
        assert after[0].keys() == before[0].keys()
        assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


def test_out_of_memory_is_recorded(work):
    cleaned = []

    @contextmanager
    def too_big(_work):
        def run():
            raise torch.OutOfMemoryError

        try:
            yield run
        finally:
            cleaned.append(True)

    assert measure(work, too_big, 1, Meter(torch.device("cpu"))) == {"out_of_memory": True}
    assert cleaned
    assert "out of memory" in full_size.table({"tuning": {"too big": {"out_of_memory": True}}})


def test_lora_by_hand_is_that_of_peft(work):
    pytest.importorskip("peft")
    ids = work.batches[0].rows.input_ids[:2]
    clean = work.model(ids).logits
    found = []
    for make in (full_size.lora_of_peft, full_size.lora_by_hand):
        adapter = make(work)
        with torch.no_grad():
            for weight in adapter.weights:  # A then B, matrix by matrix
                weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
            found.append((work.model(ids).logits, sorted(w.shape for w in adapter.weights)))
            with adapter.disabled():
                assert torch.equal(work.model(ids).logits, clean)
        adapter.remove()
    assert not torch.allclose(found[0][0], clean)
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
