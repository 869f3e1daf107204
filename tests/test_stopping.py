"""SIGTERM ends a command in good order."""

from __future__ import annotations

import os
import signal

import pytest

from bad_neurons import cli, stages
from bad_neurons.stopping import Stopped, stopped_by_sigterm
from bad_neurons.writing import written_aside


def interrupted(path):
    with written_aside(path) as aside:
        aside.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        aside.write_text("whole")


def test_what_is_being_written_is_taken_back(tmp_path):
    with pytest.raises(Stopped) as stopped, stopped_by_sigterm():
        interrupted(tmp_path / "a.txt")
    assert (stopped.value.code, stopped.value.name) == (143, "SIGTERM")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_somebody_s_own_handler_stays(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with stopped_by_sigterm():
            interrupted(tmp_path / "a.txt")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (seen, (tmp_path / "a.txt").read_text()) == ([1], "whole")


def test_the_command_s_status_and_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "export_command", lambda arguments: interrupted(tmp_path / "a.txt"))
    assert cli.main(["export"]) == 143
    assert capsys.readouterr().err == "\nstopped by SIGTERM; the same command goes on from where it can\n"
