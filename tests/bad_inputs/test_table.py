"""The table of bad inputs in ``docs/reliability.md``: every row still answers so, in one line, and nothing broken is left."""

from __future__ import annotations

import re
import shutil

import pytest

from bad_inputs.answers import answer, row, rows_of_the_page
from bad_inputs.cases import Ground, every_case
from bad_neurons.cli import main


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Every case with its answer."""
    ground = Ground(tmp_path_factory.mktemp("bad") / "inputs")
    return [(case, answer(ground, case)) for case in every_case(ground)]


def test_the_good_files_are_good(tmp_path, capsys):
    """Else the cases would be refused for something else than what is wrong with them."""
    ground = Ground(tmp_path / "inputs")
    for arguments in (ground.select(), ground.like(ground.neurons), ground.report(ground.good / "run"), ground.evaluate()):
        assert main(arguments) == 0, capsys.readouterr().err
    shutil.rmtree(ground.out)
    assert main(ground.export(ground.delta)) == 0


def test_each_answer_is_one_line_with_status_2(answered):
    assert len(answered) >= 150
    for case, given in answered:
        assert given.status == 2, (case, given)
        assert given.line.startswith("bad-neurons: "), (case, given)
        assert "\n" not in given.line
        assert len(given.line) < 1200
        assert "Traceback" not in given.line


def test_nothing_broken_is_left(answered):
    assert [(case.what, case.wrong, given.left) for case, given in answered if given.left] == []


def test_the_page_says_the_same(answered):
    there = rows_of_the_page()
    assert len(there) == len(answered)
    for line, (case, given) in zip(there, answered, strict=True):
        assert _settled(line) == _settled(row(case, given))


def _settled(line: str) -> str:
    """A row without what other libraries say in brackets: their words change with their versions."""
    line = re.sub(r"\b\d{11,}\b", "many", line)  # bytes of the first tensor that did not fit: threads load them in any order
    return re.sub(r"\((?:\w+Error|\w+Exception)?: .*", "", line) if "model folder" in line or "SAE folder" in line else line
