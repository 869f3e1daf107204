"""One writer a folder, by locks that die with their process."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys

import pytest

from bad_neurons.cli import main
from bad_neurons.errors import UserError
from bad_neurons.lock import sole_writer
from helpers import tiny_run_config

HOLD = (
    "import sys, time; from bad_neurons.lock import sole_writer\nwith sole_writer(sys.argv[1]): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / 'run'``."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_nothing_is_left(tmp_path):
    with sole_writer(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with sole_writer(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_one_is_refused_and_the_first_goes_on(tmp_path):
    with sole_writer(tmp_path / "run"), sole_writer(tmp_path / "other"):
        for _ in range(2):
            with pytest.raises(UserError, match=rf"run: another bad-neurons \(process {os.getpid()} on .*\) is writing here"):
                sole_writer(tmp_path / "run").__enter__()
        assert (tmp_path / "run" / ".lock").is_file()


def test_a_run_and_a_stage_alone_are_refused_with_one_line(tmp_path, holder, capsys):
    config = tiny_run_config(tmp_path)
    run = str(tmp_path / "run")
    for command in (
        ["run", "--config", str(config)],
        ["report", "--run", run],
        ["select", "--model", "none", "--out", run],
        ["sae", "fit", "--data.model", "none", "--data.layers", "[1]", "--model.out", run],
        ["tune", "fit", "--model.model", "none", "--mask.neurons", "none", "--delta.path", f"{run}/delta.safetensors"],
    ):
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith("bad-neurons: ")
        assert f"another bad-neurons (process {holder.pid} on" in said[-1], command
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    with sole_writer(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_file_that_its_owner_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between the opening and the locking another process may end; what is locked then is a file that nobody else sees."""
    really, calls = fcntl.flock, []

    def flock(handle, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(handle)
        really(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_writer(tmp_path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(UserError, match="another bad-neurons"):
            sole_writer(tmp_path).__enter__()


def test_a_full_disk_leaves_nothing_locked(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)") as kept, sole_writer(tmp_path):  # noqa: F841
            raise AssertionError("not reached")
    with sole_writer(tmp_path):  # though the error above, with its frames, still lives
        pass


def test_of_several_ranks_the_first_one_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with sole_writer(tmp_path), sole_writer(tmp_path):
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")  # of all nodes, where there are several
    with sole_writer(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_what_killed_writers_left_is_swept(tmp_path, holder):
    node = platform.node()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"a/.b.json.partial-{node}-{dead.pid}", f".sae.old-{node}-{dead.pid}/x", f".c.partial-elsewhere-{dead.pid}",
                 f".d.partial-{node}-{holder.pid}", ".e.json", "f.partial"):  # fmt: skip
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text("")
    with sole_writer(tmp_path / "folder"):
        pass
    left = sorted(path.name for path in (tmp_path / "folder").rglob("*"))
    assert left == [f".c.partial-elsewhere-{dead.pid}", f".d.partial-{node}-{holder.pid}", ".e.json", "a", "f.partial"]
