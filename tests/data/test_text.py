"""Running text: paragraphs, and parts that never share one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from bad_neurons.data import text as text_module
from bad_neurons.data.text import load_paragraphs
from bad_neurons.errors import UserError

PARTS = ("sae", "retention", "measure")


def paragraph(i, length=250):
    return f"{i:03d} {'word ' * 300}"[:length].rstrip()


@pytest.fixture
def file(tmp_path):
    """Twenty paragraphs, of which one stands there twice, and what is no paragraph."""
    blocks = [paragraph(i) for i in range(20)] + [paragraph(7), "A heading", paragraph(90, 199)]
    (tmp_path / "text.txt").write_text("\n \n\n".join(blocks), encoding="utf-8")
    return str(tmp_path / "text.txt")


def all_parts(source):
    return [p for part in PARTS for p in load_paragraphs(source, part)]


def test_three_disjoint_parts_are_together_everything(file):
    assert [len(load_paragraphs(file, part)) for part in PARTS] == [12, 4, 4]
    assert sorted(all_parts(file)) == [paragraph(i) for i in range(20)]


def test_the_seed_orders_but_never_moves_a_paragraph_to_another_part(file):
    for part in PARTS:
        first, again, other = (load_paragraphs(file, part, seed) for seed in (0, 0, 1))
        assert again == first
        assert other != first
        assert sorted(other) == sorted(first)
    assert load_paragraphs(file, "sae") != sorted(load_paragraphs(file, "sae"))


def test_python_docs_are_several_hundred_english_paragraphs():
    parts = {part: load_paragraphs("python-docs", part) for part in PARTS}
    everything = all_parts("python-docs")
    assert 400 < len(everything) < 1500
    assert len(set(everything)) == len(everything)
    assert [round(len(parts[part]) / len(everything), 2) for part in PARTS] == [0.6, 0.2, 0.2]
    assert all(200 <= len(p) <= 1200 and "\n" not in p and "  " not in p for p in everything)
    assert sum(" the " in p for p in everything) > 0.8 * len(everything)


def test_long_paragraphs_are_cut_at_the_last_space_that_fits(tmp_path):
    long = "x" * 600 + " " + "y" * 598 + " " + "z" * 300  # 600 + 1 + 598 = 1199, and the next word does not fit
    exact = "w" * 1200
    (tmp_path / "text.txt").write_text("\n\n".join([long, exact, *(paragraph(i) for i in range(10))]), encoding="utf-8")
    everything = all_parts(str(tmp_path / "text.txt"))
    assert {len(p) for p in everything} == {1199, 1200, len(paragraph(0))}
    assert long[:1199] in everything
    assert exact in everything


def test_lines_of_a_paragraph_are_joined(tmp_path):
    wrapped = [paragraph(i).replace(" ", "\n   ") for i in range(10)]
    (tmp_path / "text.txt").write_text("\n\n".join(wrapped), encoding="utf-8")
    assert sorted(all_parts(str(tmp_path / "text.txt"))) == [paragraph(i) for i in range(10)]


def test_a_folder_is_all_its_text_files(tmp_path):
    (tmp_path / "below").mkdir()
    for number, name in enumerate(("a.txt", "below/b.txt", "c.md")):
        (tmp_path / name).write_text("\n\n".join(paragraph(10 * number + i) for i in range(10)), encoding="utf-8")
    assert sorted(all_parts(str(tmp_path))) == [paragraph(i) for i in range(20)]


def refusal(source, part="sae"):
    with pytest.raises(UserError) as error:
        load_paragraphs(source, part)
    return str(error.value)


def test_too_little_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraph(i) for i in range(9)), encoding="utf-8")
    assert refusal(str(path)) == f"text {path}: only 9 paragraphs of 200 characters or more; at least 10 are needed"
    (tmp_path / "empty").mkdir()
    assert refusal(str(tmp_path / "empty")).startswith(f"text {tmp_path}/empty: only 0 paragraphs")


def test_what_cannot_be_read_is_refused(tmp_path):
    assert refusal(str(tmp_path / "none.txt")).startswith(
        f"{tmp_path}/none.txt: cannot be read (No such file or directory); expected python-docs"
    )
    (tmp_path / "latin.txt").write_bytes("naïve ".encode("latin-1") * 1000)
    assert refusal(str(tmp_path / "latin.txt")).startswith(f"{tmp_path}/latin.txt: cannot be read (not UTF-8 text)")


def test_an_unknown_part_is_refused(file):
    assert refusal(file, "train") == "text part 'train': expected one of sae, retention, measure"


class Rows(list):
    """A streamed data set."""

    def take(self, n):
        return self[:n]


@pytest.fixture
def hub(monkeypatch):
    """A hub whose data set is set by the test; gives the calls."""
    calls = []
    state = SimpleNamespace(calls=calls, rows=Rows(), error=None)

    def load_dataset(name, **options):
        calls.append((name, options))
        if state.error:
            raise state.error
        return state.rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return state


def test_a_data_set_of_the_hub_gives_its_text_column(hub, monkeypatch):
    monkeypatch.setattr(text_module, "_LENGTH", (1, 1200))
    hub.rows = Rows({"text": str(i)} for i in range(6000))
    everything = all_parts("hub:some/set")
    assert sorted(everything, key=int) == [str(i) for i in range(5000)]
    assert hub.calls == [("some/set", {"split": "train", "streaming": True})] * 3


@pytest.mark.parametrize("error", [ConnectionError("no network"), FileNotFoundError("no such set"), ValueError("no such split")])
def test_a_hub_without_an_answer_is_refused(hub, error):
    hub.error = error
    message = f"text hub:some/set: the hub gave no data set with a `text` column ({type(error).__name__}); a text file works too"
    assert refusal("hub:some/set") == message


def test_a_data_set_without_text_is_refused(hub):
    hub.rows = Rows([{"content": "x"}])
    assert "no data set with a `text` column (KeyError)" in refusal("hub:some/set")
