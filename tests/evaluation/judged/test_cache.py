"""What is kept on disk, and what a kill leaves of it."""

from __future__ import annotations

import errno
import json
import os

import pytest

from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept


def test_rows_come_back(tmp_path):
    path = tmp_path / "new" / "kept.jsonl"
    kept = Kept(path)
    assert "a" not in kept
    kept.put("a", {"score": 1.5, "reply": "zwei\n\u2028 \ud800"})
    assert kept["a"]["score"] == 1.5
    again = Kept(path)
    assert again["a"] == {"score": 1.5, "reply": "zwei\n\u2028 ?"}
    assert "b" not in again


def test_every_line_that_is_cut_short_is_redone_and_no_other(tmp_path, caplog):
    path = tmp_path / "kept.jsonl"
    kept = Kept(path)
    for name in "abc":
        kept.put(name, {"reply": f"reply {name}"})
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        torn = Kept(path)
        done = length == len(whole) - 1  # all but the line's end is there
        assert ["a" in torn, "b" in torn, "c" in torn] == [True, True, done]
        torn.put("d", {"reply": "after"})
        torn.put("c", {"reply": "again"})
        again = Kept(path)
        assert {name: again[name]["reply"] for name in "abcd"} == {
            "a": "reply a",
            "b": "reply b",
            "c": "reply c" if done else "again",
            "d": "after",
        }
    assert "line 3: format 'str'; expected 'bad-neurons/kept/1'" in caplog.text
    assert "it is ignored, and what it held is asked again" in caplog.text


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b"{}", b'{"key": 3}', b"null"])
def test_lines_that_are_none_are_ignored(tmp_path, line):
    path = tmp_path / "kept.jsonl"
    one = Kept(path)
    one.put("a", {"reply": "x"})
    path.write_bytes(path.read_bytes() + line + b"\n\n")
    one.put("b", {"reply": "y"})
    kept = Kept(path)
    assert (kept["a"], kept["b"]) == ({"reply": "x"}, {"reply": "y"})


def test_the_first_of_two_rows_counts(tmp_path):
    path = tmp_path / "kept.jsonl"
    one, other = Kept(path), Kept(path)
    one.put("a", {"reply": "first"})
    other.put("a", {"reply": "second"})
    assert [json.loads(line)["reply"] for line in path.read_text().splitlines()] == ["first", "second"]
    assert Kept(path)["a"] == {"reply": "first"}


def test_full_disk_and_bad_places(tmp_path, monkeypatch):
    kept = Kept(tmp_path / "kept.jsonl")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("bad_neurons.evaluation.judged.cache.os.fsync", full)
        with pytest.raises(UserError, match=r"kept.jsonl: cannot be written \(No space left on device\)"):
            kept.put("a", {"reply": "x"})
    assert "a" not in kept
    with pytest.raises(UserError, match="cannot be read"):
        Kept(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Kept(tmp_path / "file" / "kept.jsonl").put("a", {})


def test_a_line_that_changed_is_ignored(tmp_path, caplog):
    path = tmp_path / "kept.jsonl"
    kept = Kept(path)
    kept.put("a", {"score": 3.0})
    kept.put("b", {"score": 1.0})
    whole = path.read_bytes()
    assert Kept(path)["a"] == {"score": 3.0}
    first = whole.index(b"\n")
    for place in range(first):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            again = Kept(path)
            assert "a" not in again or again["a"] == {"score": 3.0}, bytes(changed[:first])
            assert again["b"] == {"score": 1.0} or changed.count(b"\n") != 2
    path.write_bytes(b'{"key": "a", "score": 3.0}\n')
    caplog.clear()
    assert "a" not in Kept(path)
    assert "line 1: format None is of an older version" in caplog.text
