"""Files whole or not at all, and digests."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bad_neurons import writing
from bad_neurons.artifacts import digest_json, digest_path, read_json, read_tensors, write_json, write_jsonl, write_tensors, written_aside
from bad_neurons.errors import UserError
from bad_neurons.sealed import Format

THING = Format("bad-neurons/thing/1", "bad-neurons thing")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def write_file(path, error):
    with written_aside(path) as aside:
        aside.write_text("half")
        raise error


def write_folder(path, error=None):
    with written_aside(path) as aside:
        aside.mkdir()
        (aside / "new.txt").write_text("new")
        if error is not None:
            raise error


@pytest.fixture
def full_disk(monkeypatch):
    def fail(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def test_a_file_is_written_into_new_folders(tmp_path):
    with written_aside(tmp_path / "a" / "b.txt") as aside:
        assert aside.parent == tmp_path / "a"  # the same file system, so that the move is one
        aside.write_text("new")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert (tmp_path / "a" / "b.txt").read_text() == "new"
    assert everything(tmp_path) == ["a", "a/b.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_file(path, error)
    assert path.read_text() == "old"
    assert everything(tmp_path) == ["b.txt"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with written_aside(folder) as aside:
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "new.txt").write_text("new")
        assert everything(folder) == ["old.txt"]
    assert everything(tmp_path) == ["model", "model/deep", "model/deep/new.txt"]


def test_an_error_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_folder(folder, ZeroDivisionError)
    assert everything(tmp_path) == ["model", "model/old.txt"]


def test_what_an_earlier_crash_left_is_not_taken_over(tmp_path):
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "model") as left:
        raise ZeroDivisionError
    left.mkdir()
    (left / "old.txt").write_text("from a process with the same number")
    with written_aside(tmp_path / "model") as aside:
        assert aside == left
        aside.mkdir()
    assert everything(tmp_path) == ["model"]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "b.json"
    path.write_text("old")
    writes = [lambda: write_json(path, {}), lambda: write_jsonl(path, [{}]), lambda: write_tensors(path, {"a": torch.ones(1)}, {})]
    for write in writes:
        with pytest.raises(UserError, match=r"b\.json: cannot be written \(No space left on device\); nothing before it was changed"):
            write()
        assert path.read_text() == "old"
        assert everything(tmp_path) == ["b.json"]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    with pytest.raises(UserError, match="No space left"):
        write_folder(tmp_path / "model")
    assert everything(tmp_path) == ["model", "model/old.txt"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    """Where the file system cannot let two folders change places."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    really = os.replace

    def replace(source, target):
        if Path(target).name == "model" and ".partial" in Path(source).name:
            raise OSError(errno.EIO, "Input/output error")
        really(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    with pytest.raises(UserError, match="Input/output error"):
        write_folder(tmp_path / "model")
    assert everything(tmp_path) == ["model", "model/old.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "file" / "b.json", {})


@given(json_values)
def test_json_survives(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path, "a value") == value


def test_numbers_that_json_does_not_have_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": float("inf")}])
    assert everything(tmp_path) == []


def test_jsonl(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"a": "é\u2028"}, {"b": [1, None]}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"a": "é\u2028"}\n{"b": [1, null]}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, r"No such file"), (b"\xff\xfe", "not UTF-8 text"), (b'{\n"a": }', r"line 2: not JSON \(Expecting value\); expected a thing")],
)
def test_unreadable_json(tmp_path, content, said):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_json(path, "a thing")
    assert str(caught.value).startswith(f"{path}: ")


def test_tensors_survive(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}  # the first is not contiguous
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": THING, "list": [1, 2]})
    found, metadata = read_tensors(tmp_path / "a.safetensors", THING)
    assert metadata == {"format": THING, "list": [1, 2]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items())


def test_equal_tensors_are_equal_bytes(tmp_path):
    for number in range(8):  # safetensors orders metadata anew each time
        write_tensors(tmp_path / f"{number}", {"a": torch.ones(1), "b": torch.zeros(2)}, {key: key for key in "abcdef"})
    assert len({digest_path(tmp_path / f"{number}") for number in range(8)}) == 1


@pytest.mark.parametrize("size", [None, 0, 4, 40, -1])
def test_unreadable_tensors(tmp_path, size):
    path = tmp_path / "a.safetensors"
    if size is not None:
        write_tensors(path, {"a": torch.ones(9)}, {})
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read as bad-neurons/thing/1"):
        read_tensors(path, THING)


def test_digest_of_json():
    assert digest_json({"b": 1, "a": [1, 2]}) == digest_json({"a": (1, 2), "b": 1})
    assert len({digest_json(v) for v in ({"a": [1, 2]}, {"a": [2, 1]}, {"a": "[1,2]"}, [1, 2], 1, "1", None)}) == 7
    # sha256 of {"a":[1,2]}, by `printf '{"a":[1,2]}' | sha256sum`
    assert digest_json({"a": [1, 2]}) == "01530d164d479cf08e26d3b1ad9bdba927120d97e2d057a6d792db778780d720"


def test_digest_of_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert digest_path(tmp_path / "a.txt") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert digest_path(tmp_path / "nothing") == "absent"
    seen = {digest_path(tmp_path)}
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    seen.add(digest_path(tmp_path))
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").rename(tmp_path / "deep" / "b.txt")
    seen.add(digest_path(tmp_path))
    (tmp_path / "deep" / "b.txt").write_bytes(b"abd")
    last = digest_path(tmp_path)
    assert len({*seen, last}) == 4
    (tmp_path / ".hidden").write_text(json.dumps("not counted"))
    assert digest_path(tmp_path) == last


def test_a_user_error_is_one_line():
    assert str(UserError("a\n  b\tc")) == "a b c"
