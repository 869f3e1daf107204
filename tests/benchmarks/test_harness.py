"""The part that all benchmarks share, with toy contenders."""

from __future__ import annotations

import json

import harness
import pytest
import table


def test_contenders_take_turns_in_processes_of_their_own(tmp_path):
    log = tmp_path / "log"
    contenders = [harness.Contender(name, "toys:allocating", {"megabytes": size, "log": str(log)}) for name, size in (("a", 30), ("b", 60))]
    rows = harness.compare(contenders, rounds=2)
    order = [line.split() for line in log.read_text().splitlines()]
    assert [size for size, _ in order] == ["30", "60", "30", "60", "30", "60"]  # a warm-up each, then turn by turn
    assert len({process for _, process in order}) == 2
    for name, size in (("a", 30), ("b", 60)):
        row = rows[name]
        assert row["seconds"] == pytest.approx(sum(row["seconds_all"]) / 2, abs=1e-3)  # the median of two
        assert row["rate"] == size / row["seconds"]
        assert row["peak_bytes"] / 2**20 == pytest.approx(size, abs=4)  # the kernel counts a process's pages in steps
        assert row["kept"] == 8 * 2**20


def test_a_failing_contender_is_named():
    with pytest.raises(RuntimeError, match="broken: ValueError: no such model"):
        harness.compare([harness.Contender("broken", "toys:failing")])


def test_results_of_one_day_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.write_results("one", {"rows": {"x": {"seconds": 1.0}}})
    assert harness.write_results("two", {"rows": {}}) == path
    content = json.loads(path.read_text())
    assert set(content["benchmarks"]) == {"one", "two"}
    assert content["machine"]["versions"]["torch"]


def test_the_table_says_what_holds_what_does_not_and_what_is_missing():
    rows = {"--help": {"seconds": 0.5}, "run, nothing changed": {"seconds": 3.5}}
    machine = {"processor": "P", "cores": 2, "memory_gib": 1, "python": "3", "versions": {"torch": "2"}}
    lines = table.table({"machine": machine, "benchmarks": {"startup": {"rows": rows}}}).splitlines()
    assert "| bad-neurons --help, seconds |  | at most 2 | 0.5 | yes |" in lines
    assert "| a run in which nothing changed, seconds |  | at most 3 | 3.5 | **no** |" in lines
    assert sum("not run: `python benchmarks/" in line for line in lines) == len(table.CLAIMS) - 2
    assert all((table.RESULTS.parent / f"{claim.benchmark}.py").is_file() for claim in table.CLAIMS)
