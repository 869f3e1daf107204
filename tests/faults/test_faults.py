"""Full and read-only disks, lost caches, clocks that jump, signals in the middle of a save: nothing finished is harmed."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from bad_neurons.artifacts import digest_path, write_json, write_jsonl, write_tensors
from bad_neurons.checkpoints import SealedCheckpoints
from bad_neurons.cli import main
from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.models import packaged
from bad_neurons.testing import save_tiny_model
from bad_neurons.tuning.clean_cache import CleanCache, CleanPass
from bad_neurons.writing import written_aside


def test_kills_at_random(tmp_path):
    """The script of `make faults`, at its smallest."""
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", "6", "--seed", "1", "--work", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as in the Makefile: it forks
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert "6 of 6 kills ended with the same bits" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


@contextlib.contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[None]:
    """A disk of so many kilobytes at ``folder``; skipped where this process may not mount one."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_disk_that_fills_stage_by_stage(place, one_line):
    with mounted(place.clean(), 60):
        refused, room = 0, 60
        while status := place.command():
            assert status == 2
            assert "cannot be written (No space left on device)" in one_line()
            assert not [path for path in place.run.rglob(".*") if "partial" in path.name]
            refused, room = refused + 1, int(1.6 * room)
            remount(place.run, f"size={room}k")
        assert refused > 3
        assert place.wrong() == []


def test_a_folder_that_cannot_be_written(place, one_line):
    with mounted(place.clean(), 50_000):
        shutil.copytree(place._finished, place.run, dirs_exist_ok=True)
        before = digest_path(place.run)
        remount(place.run, "ro")
        for options in ([], ["--force", "tuning"]):
            assert place.command(*options) == 2
            assert "cannot be written (Read-only file system)" in one_line()
        assert digest_path(place.run) == before
        remount(place.run, "rw")
        assert place.command("--force", "tuning") == 0
        assert place.wrong() == []


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Files of more bytes cannot be written, as on a disk that is full: everybody may do this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "json": lambda path: write_json(path, "x" * 300_000),
    "jsonl": lambda path: write_jsonl(path, [{"a": "x" * 300_000}]),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(100_000)}, {}),
    "checkpoint": lambda path: SealedCheckpoints().save_checkpoint({"a": torch.ones(100_000)}, path),
    "model": lambda path: _save_large(path),
}


def _save_large(path: Path) -> None:
    from safetensors.torch import save_file

    with written_aside(path) as aside:
        aside.mkdir()
        (aside / "small.json").write_text("{}")
        save_file({"a": torch.ones(100_000)}, aside / "large.safetensors")


@pytest.mark.parametrize("kind", WRITERS)
def test_what_does_not_fit_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "artifact"
    WRITERS[kind](path)
    before = digest_path(path)
    with no_file_above(200_000), pytest.raises(UserError, match=r"artifact: cannot be written \(File too large\); nothing before it"):
        WRITERS[kind](path)
    assert digest_path(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_answer_that_does_not_fit_is_asked_again(tmp_path):
    kept = Kept(tmp_path / "verdicts.jsonl")
    kept.put("one", {"score": 3})
    with no_file_above(100), pytest.raises(UserError, match="cannot be written"):
        kept.put("two", {"score": 4, "text": "x" * 200})
    assert "two" not in kept
    again = Kept(tmp_path / "verdicts.jsonl")
    assert again["one"] == {"score": 3}
    assert "two" not in again
    again.put("two", {"score": 5})
    assert Kept(tmp_path / "verdicts.jsonl")["two"] == {"score": 5}


def test_sigterm_in_the_middle_of_a_save(place, monkeypatch, capfd):
    place.clean()
    fsync, due, counted = os.fsync, random.Random(4), [0]

    def interrupted(handle: int) -> None:
        counted[0] -= 1
        if counted[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", interrupted)
    stopped = 0
    counted[0] = due.randrange(20, 80)
    while status := place.command():
        assert status == 128 + 15
        assert "stopped by SIGTERM; the same command goes on from where it can" in capfd.readouterr().err
        assert not [path for path in place.run.rglob(".*") if "partial" in path.name or path.name == ".lock"]
        stopped, counted[0] = stopped + 1, due.randrange(20, 80)
    counted[0] = 0  # comparing writes, too
    assert stopped > 1
    assert place.wrong() == []


def test_nothing_is_decided_by_a_clock(place, monkeypatch, caplog):
    """Dates of all files that say nothing, and a clock that jumps to and fro while the second half is done again."""
    run = place.finished()
    for number, path in enumerate(sorted(place.config.parent.rglob("*"))):
        os.utime(path, (number % 3 * 10**9, (number * 7) % 5 * 10**9))
    with caplog.at_level("INFO"):
        assert place.command() == 0
    assert sum("unchanged, skipped" in record.message for record in caplog.records) == 6
    jump = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jump.uniform(0, 4e9))
    (run / "selection" / "neurons.json").unlink()
    (run / "tuning" / "delta.safetensors").unlink()
    (run / "evaluation" / "results.json").unlink()
    assert place.command() == 0
    assert place.wrong() == []


def test_a_model_cache_that_vanished(tmp_path, monkeypatch, place):
    """The converted copy of a packaged model is made again, and what is tuned from it is the same."""
    monkeypatch.setenv("BAD_NEURONS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(packaged.PACKAGED_MODELS, "tiny", packaged.PackagedModel((), (), "0" * 64, "nothing"))
    monkeypatch.setattr(packaged, "_gguf_file", lambda name, spec: contextlib.nullcontext(tmp_path))
    monkeypatch.setattr(packaged, "_convert", lambda gguf, folder: save_tiny_model(folder))
    config = yaml.safe_load(place.config.read_text()) | {"model": "packaged:tiny", "out": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = ["run", "--config", str(tmp_path / "run.yaml")]
    assert main(command) == 0
    delta = (tmp_path / "run" / "tuning" / "delta.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    assert main([*command, "--force", "tuning"]) == 0
    assert (tmp_path / "run" / "tuning" / "delta.safetensors").read_bytes() == delta
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["tiny-000000000000"]


def test_a_kept_clean_pass_that_is_damaged_or_gone_is_computed_again(tmp_path):
    one = CleanPass(torch.ones(3, 2), torch.ones(2, 2))
    writer = CleanCache(10**6, tmp_path, "origin")
    for key in ("whole", "cut", "gone"):
        writer.put(key, one)
    path = tmp_path / "origin" / "cut.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "origin" / "gone.safetensors").unlink()
    reader = CleanCache(10**6, tmp_path, "origin")
    assert torch.equal(reader.get("whole").hidden, one.hidden)
    assert reader.get("cut") is reader.get("gone") is None
