"""A finished run at a place, and later runs at the same place, since paths are part of what a run is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import _without_time, differences

from bad_neurons.cli import main
from helpers import tiny_run_config


class Place:
    """Where runs are made.

    Attributes:
        config: the YAML file.
        run: the run's folder.
    """

    def __init__(self, work: Path) -> None:
        self.config, self.run = tiny_run_config(work), work / "run"
        self._finished, self._reference = work / "finished", work / "reference"
        assert self.command() == 0
        shutil.copytree(self.run, self._finished)
        self.run.rename(self._reference)
        _without_time(self._reference)

    def command(self, *options: str) -> int:
        """The command, always the same; gives its status."""
        return main(["run", "--config", str(self.config), *options])

    def clean(self) -> Path:
        """No run is there."""
        shutil.rmtree(self.run, ignore_errors=True)
        return self.run

    def finished(self) -> Path:
        """A finished run is there."""
        shutil.copytree(self._finished, self.clean())
        return self.run

    def wrong(self) -> list[str]:
        """Files of the run that are not those of the run to which nothing happened."""
        return differences(self._reference, self.run)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished run to compare with."""
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def one_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was said last on standard error: one line that begins with the program's name, and no traceback before it."""

    def said() -> str:
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert text.strip().splitlines()[-1].startswith("bad-neurons: ")
        return text.strip().splitlines()[-1]

    return said
