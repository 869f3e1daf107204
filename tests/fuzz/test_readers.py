"""Readers under hypothesis: whatever the bytes, a value or the one-line error."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bad_neurons.reading import CONFIG_BYTES, parse_json, parse_yaml, read_text
from fuzz.readers import READERS, read, write_good

# As many as take a second or two; the same ones each time.
few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(few, max_examples=200)

PIECES = [
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-" + b"9" * 400, b"1e999", b"NaN", b"Infinity",
    b'"\\ud800"', b"&a [*a]", b"*a", b"!!python/name:os.system", b"? ", b"\t", b"\r\n", b"\n\n", b'"', b"'", b",", b"|", b">", b"%YAML 9.9",
    b"__metadata__", b"\x7f" * 8, b"\xff" * 8, b"<<: {a: 1}", b"1:59:59", b"0x" + b"f" * 5000, b"2001-99-99", b"\xc3\x28", b"\xed\xa0\x80",
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good file of each kind, with its bytes."""
    return {kind: (path, path.read_bytes()) for kind, path in write_good(tmp_path_factory.mktemp("fuzz")).items()}


@st.composite
def spoilt(draw, whole: bytes):
    """``whole`` with up to four changes: cut, doubled, turned over, or with something put in."""
    content = whole
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.integers(0, 64)))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=16))
        content = draw(
            st.sampled_from(
                [content[:at], content[:at] + piece + content[at:], content[:at] + piece + content[to:], content[:to] + content[at:]]
            )
        )
    return content


@pytest.mark.parametrize("kind", READERS)
def test_a_good_file_is_read(good, kind):
    path, _ = good[kind]
    assert read(kind, path) is None


@pytest.mark.parametrize("kind", READERS)
@few
@given(data=st.data())
def test_spoilt_files(good, kind, data):
    path, whole = good[kind]
    try:
        path.write_bytes(data.draw(spoilt(whole)))
        read(kind, path)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", READERS)
@few
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(good, kind, content):
    path, whole = good[kind]
    try:
        path.write_bytes(content)
        read(kind, path)
    finally:
        path.write_bytes(whole)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", ["records", "anthropic", "neurons", "results", "sae configuration", "judge"])
@few
@given(data=st.data())
def test_fields_of_another_kind(good, kind, data):
    path, whole = good[kind]
    row = json.loads(whole)
    name = data.draw(st.sampled_from(sorted(row)))
    try:
        path.write_text(json.dumps({**row, name: data.draw(values)}), encoding="utf-8")
        read(kind, path)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["neurons", "delta", "probe", "shard", "results"])
def test_every_bit_counts(good, kind):
    """One bit turned over, anywhere: refused, or (a digit that no float has room for) read as the same."""
    path, whole = good[kind]
    try:
        for place in range(0, len(whole), max(1, len(whole) // 150)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            said = read(kind, path)
            assert said is not None, (place, bytes(changed[max(0, place - 20) : place + 20]))
    finally:
        path.write_bytes(whole)


@many
@given(value=values)
def test_what_is_well_formed_is_read(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


plain = st.recursive(
    texts | st.integers(-(10**6), 10**6) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)


@many
@given(value=plain)
def test_well_formed_yaml_is_read(value):
    assert parse_yaml(yaml.safe_dump(value)) == value


def _bomb(levels: int) -> str:
    """YAML of a kilobyte that stands for 9 to the power of ``levels`` values."""
    names = "abcdefghijklmnopqrstuvwxyz"
    pairs = itertools.pairwise(names[: levels + 1])
    return "a: &a [x, x]\n" + "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairs)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5, "- " * 10**5, "{a: " * 10**5, _bomb(20), "1" + ":59" * 10**5, "9" * 10**5, "? " * 10**5, "!!int " + "9" * 10**5,
        "'" * 10**5, '"\\x' * 10**5, "&a " * 10**5, "\n" * 10**5, "a: [" + "x, " * 20_000 + "]",
    ],
    ids=range(13),
)  # fmt: skip
@pytest.mark.timeout(120)
def test_bounded_time_and_memory(text):
    tracemalloc.start()
    try:
        with suppress(ValueError):
            parse_yaml(text[:CONFIG_BYTES])
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 300 * 10**6


@pytest.mark.timeout(60)
def test_a_large_file_is_not_even_begun(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as handle:
        handle.truncate(1 << 41)
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match="2,199,023,255,552 bytes, and 1,073,741,824 are read at most"):
            read_text(path, "a file")
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10**6
