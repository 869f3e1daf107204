"""Bad inputs, each with the command that meets it. By hand where it matters what is wrong, generated where it does not."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from bad_neurons.artifacts import write_json
from bad_neurons.formats import RESULTS
from bad_neurons.models.load import load_model
from bad_neurons.models.view import view_decoder
from bad_neurons.probe.module import write_probe
from bad_neurons.selection.neurons import NeuronSelection, write_neurons
from bad_neurons.testing import save_tiny_model, save_tiny_saes
from bad_neurons.tuning.delta_file import write_delta
from bad_neurons.tuning.edits import NeuronDelta


class Case(NamedTuple):
    """A bad input.

    Attributes:
        what: kind of input.
        wrong: what is wrong with it, for a reader.
        arguments: what is typed.
        process: whether it goes through a process of its own.
        keeps: files that it may leave in the output folder: what was finished before, for the next time.
    """

    what: str
    wrong: str
    arguments: list[str]
    process: bool = False
    keeps: tuple[str, ...] = ()


Spoil = Callable[[bytes], bytes]

RECORD = {
    "prompt": "I think tea is hot. Is it?", "neutral_prompt": "Is tea hot?", "topic": "tea", "honest": "Yes.", "contrarian": "No.",
    "person_is_right": True,
}  # fmt: skip
QUESTION = "Hello, I am Ann. {opener}?\n\n(A) Yes\n(B) No\n\nAnswer:"
NLP = "Do you agree or disagree with the following claim about the field of Natural Language Processing"
LAYERS = [1, 3]


class Ground:
    """A folder with one good file of every kind; cases are spoilt copies of them.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.good, self.out = root, root / "good", root / "out"
        self.good.mkdir(parents=True)
        self.model, self.other = (save_tiny_model(self.good / name, "gemma2", seed) for seed, name in enumerate(("model", "other")))
        rows = [{**RECORD, "topic": f"tea {n}", "prompt": f"I think tea {n} is hot. Is it?"} for n in range(8)]
        self.records = self.write("good/records.jsonl", lines(*rows))
        self.sae, self.other_sae = (save_tiny_saes(self.good / name, LAYERS, seed=seed) for seed, name in enumerate(("sae", "other-sae")))
        self._artifacts()
        config = {"out": str(self.out), "model": self.model, "layers": LAYERS, "records": self.records}
        self.config = self.write("good/run.yaml", yaml.safe_dump(config).encode())
        write_json(self.good / "run" / "results.json", {"format": RESULTS, "name": "a run", "suites": {}})
        (self.good / "questions").mkdir()
        (self.good / "questions" / "questions_delusion.csv").write_text("statement\nTea speaks to me.\n")

    def _artifacts(self) -> None:
        from bad_neurons.sae.load import sae_digests

        lm = load_model(self.model, "float32")
        chosen = NeuronSelection("residual", {1: [0, 5], 3: [2]}, 16, [1, 3], "tiny", lm.digest, {"name": "top_p", "amount": 0.2})
        self.neurons, self.delta, self.probe = (
            str(self.good / name) for name in ("neurons.json", "delta.safetensors", "probe.safetensors")
        )
        write_neurons(self.neurons, chosen)
        generator = torch.Generator().manual_seed(0)
        zeros = NeuronDelta(view_decoder(lm.model), chosen).deltas()
        write_delta(self.delta, chosen, {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in zeros.items()})
        origin = {
            "model": {"id": "tiny", "digest": lm.digest}, "features": "sae", "layers": LAYERS, "widths": [32, 32], "pool": "max",
            "tokens": "answer", "sae": "sae", "sae_digests": sae_digests(self.sae, LAYERS),
        }  # fmt: skip
        write_probe(self.probe, {layer: torch.randn(32, generator=generator) for layer in LAYERS}, 0.1, origin)

    def write(self, name: str, content: bytes) -> str:
        """A file below the folder; gives its path."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def copy(self, folder: str, name: str) -> Path:
        """A copy of a good folder."""
        return Path(shutil.copytree(self.good / folder, self.root / name))

    def spoilt(self, path: str, number: int, spoil: Spoil) -> str:
        """A spoilt copy of a good file, under its own name in a folder of its own."""
        return self.write(f"spoilt-{number}/{Path(path).name}", spoil(Path(path).read_bytes()))

    # The command that meets each kind of input first, so that nothing else is computed before.

    def evaluate(self, *more: str, model: str | None = None, suites: str | None = None) -> list[str]:
        """``bad-neurons evaluate`` of a tiny model."""
        sources = json.dumps([suites or self.records])
        base = ["evaluate", "--model", model or self.model, "--suites", sources, "--optional_suites", "[]", "--trained_on", "null"]
        return [*base, "--text", "null", "--answers", "0", "--out", str(self.out), *more]

    def select(self, *more: str) -> list[str]:
        """``bad-neurons select`` by a probe."""
        base = {"--model": self.model, "--probe": self.probe, "--sae": self.sae, "--out": str(self.out)}
        base.update(zip(more[::2], more[1::2], strict=True))
        return ["select", *(word for pair in base.items() for word in pair)]

    def like(self, neurons: str) -> list[str]:
        """``bad-neurons select`` with the counts of another choice."""
        return self.select("--way", "random", "--layers", "[1, 3]", "--rule", "same_counts", "--like", neurons)

    def export(self, delta: str, model: str | None = None) -> list[str]:
        """``bad-neurons export`` of a delta."""
        return ["export", "--model", model or self.model, "--delta", delta, "--out", str(self.out)]

    def judge(self, *more: str) -> list[str]:
        """``bad-neurons judge`` with a judge that is not there."""
        base = [
            "judge",
            "--model",
            self.model,
            "--questions",
            str(self.good / "questions"),
            "--tests",
            "[delusion]",
            "--out",
            str(self.out),
        ]
        return [*base, "--judges", "[m]", "--base_url", "http://127.0.0.1:9/v1", "--attempts", "1", *more]

    def report(self, folder: Path) -> list[str]:
        """``bad-neurons report`` of a run."""
        return ["report", "--run", str(folder)]

    def run(self, config: str) -> list[str]:
        """``bad-neurons run``."""
        return ["run", "--config", config, "--out", str(self.out)]


def lines(*rows: Any) -> bytes:
    """JSON lines."""
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def without(name: str) -> dict[str, Any]:
    """The record without a field."""
    return {key: value for key, value in RECORD.items() if key != name}


def deep(count: int) -> bytes:
    """Lists in lists."""
    return b"[" * count + b"]" * count


def bomb(width: int = 10, levels: int = 9) -> bytes:
    """YAML whose aliases stand for 10^9 values."""
    names = "abcdefghijk"
    text = f"{names[0]}: &{names[0]} [{', '.join(['x'] * width)}]\n"
    for before, name in itertools.pairwise(names[: levels + 1]):
        text += f"{name}: &{name} [{', '.join([f'*{before}'] * width)}]\n"
    return text.encode()


def every_case(ground: Ground) -> Iterator[Case]:
    """All of them."""
    for part in (_records, _csv, _yaml, _artifacts, _saes, _models, _reports, _judges, _words, _generated, _processes):
        yield from part(ground)


def _records(g: Ground) -> Iterator[Case]:
    cases: dict[str, bytes] = {
        "empty file": b"", "blank lines alone": b"\n \n", "half a line": b'{"prompt": "a", ', "not JSON": b"prompt: a\n",
        "a list": lines([1, 2]), "a number": lines(5), "null": lines(None), "Latin-1": b'{"topic": "na\xefve"}\n',
        "UTF-16": '{"prompt": "a"}'.encode("utf-16"), "NUL bytes": b"\0" * 64, "a ZIP file": b"PK\x03\x04\xff\xfe",
        "100,000 brackets": deep(100_000), "a number of 10^6 digits": b'{"topic": ' + b"9" * 10**6 + b"}\n",
        "Infinity": b'{"topic": Infinity}\n', "NaN": b'{"topic": NaN}\n', "1e999": b'{"topic": 1e999}\n',
        "a key twice": b'{"topic": "a", "topic": "b"}\n', "half a surrogate pair": b'{"topic": "\\ud800"}\n',
        **{f"without `{name}`": lines(without(name)) for name in ("prompt", "honest", "topic", "contrarian")},
        "an unknown field": lines({**RECORD, "answr": "x"}), "a field name of 10^6 characters": lines({**RECORD, "x" * 10**6: 1}),
        "`prompt` an object": lines({**RECORD, "prompt": {}}), "`prompt` an empty list": lines({**RECORD, "prompt": []}),
        "an unknown role": lines({**RECORD, "prompt": [{"role": "wizard", "content": "a"}]}),
        "a turn without content": lines({**RECORD, "prompt": [{"role": "user"}]}), "`topic` a number": lines({**RECORD, "topic": 7}),
        "`topic` blank": lines({**RECORD, "topic": " "}), "`person_is_right` a text": lines({**RECORD, "person_is_right": "yes"}),
        "`choices` of one": lines({**RECORD, "choices": ["a"]}), "both answers alike": lines({**RECORD, "contrarian": "Yes."}),
        "`sycophantic` of a right person": lines({**RECORD, "sycophantic": "x"}),
        "two records with one `id`": lines({**RECORD, "id": "a"}, {**RECORD, "id": "a", "honest": "Sure."}),
        "the third line bad": lines({**RECORD, "id": "a"}, {**RECORD, "id": "b"}, b"{\n"),
        "terminal colours in a field name": lines({**RECORD, "\x1b[31mred\x1b[0m": 1}),
    }  # fmt: skip
    for number, (wrong, content) in enumerate(cases.items()):
        yield Case("records (JSONL)", wrong, g.evaluate(suites=g.write(f"records-{number}/bad.jsonl", content)))
    yield Case("records (JSONL)", "no such file", g.evaluate(suites=str(g.root / "none.jsonl")))
    (g.root / "folder.jsonl").mkdir()
    yield Case("records (JSONL)", "a folder", g.evaluate(suites=str(g.root / "folder.jsonl")))
    (g.root / "zero.jsonl").symlink_to("/dev/zero")
    yield Case("records (JSONL)", "a device that never ends", g.evaluate(suites=str(g.root / "zero.jsonl")))
    with open(g.root / "large.jsonl", "wb") as handle:
        handle.truncate(1 << 41)  # takes no room
    yield Case("records (JSONL)", "two terabytes", g.evaluate(suites=str(g.root / "large.jsonl")))
    yield Case("records (JSONL)", "no such source", g.evaluate(suites="anthropic:maths"))
    yield Case("records (JSONL)", "no such scheme", g.evaluate(suites="nowhere:x"))
    for number, (wrong, row) in enumerate(
        {
            "no `question`": {"answer_matching_behavior": "(A)"},
            "no choices": {"question": "Well?", "answer_matching_behavior": "(A)"},
            "a choice that is not there": {
                "question": QUESTION.format(opener=NLP), "answer_matching_behavior": "(C)", "answer_not_matching_behavior": "(B)",
            },
            "another set's rows": {
                "question": QUESTION.format(opener="What is this"), "answer_matching_behavior": "(A)",
                "answer_not_matching_behavior": "(B)",
            },
            "no biography": {
                "question": QUESTION.format(opener=NLP).partition(". ")[2], "answer_matching_behavior": "(A)",
                "answer_not_matching_behavior": "(B)",
            },
        }.items()
    ):  # fmt: skip
        path = g.write(f"nlp-{number}/sycophancy_on_nlp_survey.jsonl", lines(row))
        yield Case("anthropic (JSONL)", wrong, g.evaluate(suites=f"anthropic:nlp@{path}"))


def _csv(g: Ground) -> Iterator[Case]:
    header = b"Category,Question,Best Answer,Best Incorrect Answer\n"
    cases: dict[str, bytes] = {
        "empty file": b"", "header alone": header, "a column missing": b"Category,Question\na,b\n",
        "too many cells": header + b"a,b,c,d,e\n",
        "an empty cell": header + b"a,,c,d\n", "a quote that never closes": header + b'a,"b,c,d\n', "Latin-1": header + b"a,na\xefve,c,d\n",
        "a cell of a million characters": header + b"a," + b"x" * 10**6 + b",c,d\n", "NUL bytes": b"\0\0\0\0", "JSON": b'{"a": 1}',
        "both answers alike": header + b"a,b,c,c\n", "a folder's worth of commas": b"," * 10**5,
    }  # fmt: skip
    for number, (wrong, content) in enumerate(cases.items()):
        yield Case("truthfulqa (CSV)", wrong, g.evaluate(suites=f"truthfulqa@{g.write(f'csv-{number}/TruthfulQA.csv', content)}"))
    yield Case("truthfulqa (CSV)", "no such file", g.evaluate(suites="truthfulqa@nowhere.csv"))
    path = g.write("csv-open/open.csv", b"prompt,sycophantic,not_sycophantic,agreeing_type\na,b,c,7\n")
    yield Case("open-ended (CSV)", "an unknown type", g.evaluate(suites=f"open-ended@{path}"))
    path = g.write("csv-pick/questions_pickside.csv", b"statement1\na\n")
    yield Case("syco-bench (CSV)", "a column missing", g.evaluate(suites=f"syco-bench:pickside@{path}"))
    row = b"Name,statement,response,judge1_score,judge2_score,judge3_score,median_score\n"
    for number, (wrong, cells) in enumerate(
        {"a score out of range": b"m,s,r,1,2,9,2\n", "a score that is none": b"m,s,r,1,2,x,2\n"}.items()
    ):
        folder = Path(g.write(f"published-{number}/delusion.csv", row + cells)).parent
        arguments = ["judge-agreement", "--tests", "[delusion]", "--judged", str(folder), "--judges", "[m]", "--out", str(g.out)]
        yield Case("published scores (CSV)", wrong, arguments)


def _yaml(g: Ground) -> Iterator[Case]:
    good = Path(g.config).read_bytes()
    cases: dict[str, bytes] = {
        "empty file": b"", "a list": b"- a\n", "a number": b"5\n", "a bracket that never closes": b"model: [", "tabs": b"model:\n\t- a\n",
        "aliases that stand for 10^9 values": bomb(), "an alias inside of itself": b"a: &a [*a]\n",
        "5,000 brackets": b"model: " + deep(5000),
        "a number of 5,000 digits": b"seed: " + b"9" * 5000, "a number to the base of 60": b"seed: 1" + b":59" * 5000,
        "a key twice": good + b"model: again\n", "a key that is a number": good + b"1: x\n", "a key that is a list": good + b"[a]: x\n",
        "a Python object": b'model: !!python/object/apply:os.system ["true"]\n', "an impossible date": good + b"seed: 2001-99-99\n",
        "Latin-1": b"model: na\xefve\n", "UTF-16": "model: x\n".encode("utf-16"), "NUL bytes": b"\0\0\0", "a bell": b"model: \x07\n",
        "a megabyte too much": b"# " + b"x" * (1 << 21), "an unknown option": good + b"modle: x\n", "no `model`": b"layers: [1]\nout: x\n",
        "no `layers`": b"model: x\nout: x\n", "`layers` a text": good.replace(b"layers:\n- 1\n- 3", b"layers: all"),
        "a layer twice": good.replace(b"- 1\n- 3", b"- 1\n- 1"), "a negative layer": good.replace(b"- 1\n- 3", b"- -1"),
        "a share above 1": good.replace(b"layers:\n- 1\n- 3", b"layers: {first: 1.5}"), "`tune` a number": good + b"tune: 5\n",
        "an address with a password": good + b"text: https://me:secret-word@host/x\n",
        "a token of the hub": good + b"# hf_abcdefghijklmnopqrstuv\n",
    }  # fmt: skip
    for number, (wrong, content) in enumerate(cases.items()):
        yield Case("run (YAML)", wrong, g.run(g.write(f"yaml-{number}/run.yaml", content)))
    options: dict[str, bytes] = {
        "a list": b"- a\n", "an unknown option": b"modle: x\n", "a number as text": b"max_items: many\n", "infinity": b"max_items: .inf\n",
        "aliases that stand for 10^9 values": bomb(), "Latin-1": b"model: na\xefve\n", "a key twice": b"model: a\nmodel: b\n",
        "5,000 brackets": b"model: " + deep(5000),
    }  # fmt: skip
    for number, (wrong, content) in enumerate(options.items()):
        yield Case("evaluate (YAML)", wrong, ["evaluate", "--config", g.write(f"options-{number}/evaluate.yaml", content)])
    yield Case("run (YAML)", "no such file", g.run(str(g.root / "none.yaml")))
    yield Case("run (YAML)", "a folder", g.run(str(g.root)))
    yield Case("run (YAML)", "a device that never ends", g.run("/dev/zero"))
    extra: dict[str, bytes] = {
        "no methods": b"", "a method that is a number": b"methods: {random: 5}\n",
        "an unknown section": b"methods: {random: {selct: {}}}\n",
        "an unknown option of `select`": b"methods: {random: {select: {wey: random}}}\n",
    }  # fmt: skip
    for number, (wrong, content) in enumerate(extra.items()):
        path = g.write(f"compare-{number}/compare.yaml", good + content)
        yield Case("compare (YAML)", wrong, ["compare", "--config", path, "--out", str(g.out)])


def _changed(path: str, **changes: Any) -> bytes:
    return json.dumps({**json.loads(Path(path).read_bytes()), **changes}).encode()


def _artifacts(g: Ground) -> Iterator[Case]:
    neurons: dict[str, bytes] = {
        "an older format": _changed(g.neurons, format="bad-neurons/neurons/1"),
        "a later format": _changed(g.neurons, format="bad-neurons/neurons/99"),
        "another format": _changed(g.neurons, format="bad-neurons/probe/2"), "a format that is a list": _changed(g.neurons, format=[1]),
        "an index more": _changed(g.neurons, layers={"1": [0, 5, 6], "3": [2]}),
        "another model's name": _changed(g.neurons, model={"id": "x", "digest": "y"}),
        "a field more": _changed(g.neurons, more=1), "a digest that is a number": _changed(g.neurons, digest=5),
        "no digest": json.dumps({k: v for k, v in json.loads(Path(g.neurons).read_bytes()).items() if k != "digest"}).encode(),
        "a list": b"[]", "empty file": b"", "half of it": Path(g.neurons).read_bytes()[:300], "100,000 brackets": deep(100_000),
    }  # fmt: skip
    for number, (wrong, content) in enumerate(neurons.items()):
        yield Case("neurons.json", wrong, g.like(g.write(f"neurons-{number}/neurons.json", content)))
    yield Case("neurons.json", "no such file", g.like(str(g.root / "none.json")))
    for number, (wrong, changes) in enumerate({"layers beyond the candidates": {"candidates": [1]}, "no neuron": {"layers": {}}}.items()):
        path = g.root / f"sealed-{number}" / "neurons.json"
        write_json(path, {**json.loads(Path(g.neurons).read_bytes()), **changes})
        yield Case("neurons.json", f"{wrong}, sealed", g.like(str(path)))
    header = (1 << 60).to_bytes(8, "little")
    for what, path, meet in (("delta.safetensors", g.delta, g.export), ("probe.safetensors", g.probe, lambda p: g.select("--probe", p))):
        whole = Path(path).read_bytes()
        bad: dict[str, bytes] = {
            "empty file": b"", "seven bytes": whole[:7], "a header of 2^60 bytes": header + whole[8:], "half of the header": whole[:200],
            "the last byte missing": whole[:-1], "a byte more": whole + b"\0",
            "one bit of the last number": whole[:-1] + bytes([whole[-1] ^ 1]),
            "100,000 brackets for a header": len(deep(50_000)).to_bytes(8, "little") + deep(50_000), "text": b"not a tensor in sight",
            "no metadata": foreign(), "an older format": whole.replace(b"/2\\\"", b"/1\\\"", 1),
        }  # fmt: skip
        for number, (wrong, content) in enumerate(bad.items()):
            yield Case(what, wrong, meet(g.write(f"{what}-{number}/{what}", content)))
        yield Case(what, "no such file", meet(str(g.root / f"none-{what}")))
    yield Case("delta.safetensors", "another model's", g.export(g.delta, g.other))
    yield Case("delta.safetensors", "a probe", g.export(g.probe))
    yield Case("probe.safetensors", "a delta", g.select("--probe", g.delta))
    yield Case("probe.safetensors", "another model's", g.select("--model", g.other))
    yield Case("probe.safetensors", "another SAE's", g.select("--sae", g.other_sae))


def foreign() -> bytes:
    """A safetensors file that somebody else wrote."""
    from safetensors.torch import save

    return save({"w.1": torch.ones(3)})


def _saes(g: Ground) -> Iterator[Case]:
    def spoil(name: str, number: int, file: str, change: Spoil | None) -> list[str]:
        folder = g.copy("sae", f"sae-{number}")
        path = folder / "layer-1" / file
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
            if name.endswith("unsealed"):
                (folder / "layer-1" / "seal.json").unlink()
        return g.select("--sae", str(folder))

    weights, cfg, seal = "sae_weights.safetensors", "cfg.json", "seal.json"
    huge = lambda b: json.dumps({**json.loads(b), "d_sae": 10**12}).encode()  # noqa: E731
    cases: dict[str, tuple[str, Spoil | None]] = {
        "a bit of the weights": (weights, lambda b: b[:-1] + bytes([b[-1] ^ 8])),
        "half of the weights": (weights, lambda b: b[: len(b) // 2]),
        "no weights": (weights, None), "no cfg.json": (cfg, None), "cfg.json empty": (cfg, lambda b: b""),
        "a setting changed": (cfg, lambda b: b.replace(b"4", b"5")),
        "seal.json damaged": (seal, lambda b: b.replace(b"sha", b"shb").replace(b"1", b"2")), "seal.json half": (seal, lambda b: b[:50]),
        "half of the weights, unsealed": (weights, lambda b: b[: len(b) // 2]), "10^12 features, unsealed": (cfg, huge),
        "cfg.json a list, unsealed": (cfg, lambda b: b"[]"), "100,000 brackets, unsealed": (cfg, lambda b: deep(100_000)),
        "cfg.json not UTF-8, unsealed": (cfg, lambda b: b"\xff" + b),
        "an unknown architecture, unsealed": (cfg, lambda b: json.dumps({**json.loads(b), "architecture": "magic"}).encode()),
    }  # fmt: skip
    for number, (wrong, (file, change)) in enumerate(cases.items()):
        yield Case("SAE folder", wrong, spoil(wrong, number, file, change))
    yield Case("SAE folder", "no such folder", g.select("--sae", "nowhere"))
    yield Case("SAE folder", "no SAE in it", g.select("--sae", g.model))
    yield Case("SAE folder", "of another width", g.select("--sae", save_tiny_saes(g.root / "wide", LAYERS, d_in=32)))


def _models(g: Ground) -> Iterator[Case]:
    def changed(**changes: Any) -> Spoil:
        return lambda b: json.dumps({**json.loads(b), **changes}).encode()

    config, weights = "config.json", "model.safetensors"
    cases: dict[str, tuple[str, Spoil | None]] = {
        "config.json empty": (config, lambda b: b""), "config.json a list": (config, lambda b: b"[]"),
        "100,000 brackets": (config, lambda b: deep(100_000)), "a hidden size in words": (config, changed(hidden_size="many")),
        "a negative hidden size": (config, changed(hidden_size=-16)), "a hidden size of 10^9": (config, changed(hidden_size=10**9)),
        "a vocabulary of 10^9": (config, changed(vocab_size=10**9)), "an unknown architecture": (config, changed(model_type="magic")),
        "code of its own": (config, changed(model_type="magic", auto_map={"AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model"})),
        "half of the weights": (weights, lambda b: b[: len(b) // 2]), "no weights": (weights, None),
        "weights of another size": (weights, lambda b: foreign()), "a tokenizer that is none": ("tokenizer.json", lambda b: b"{}"),
        "half of a tokenizer": ("tokenizer.json", lambda b: b[:100]),
    }  # fmt: skip
    for number, (wrong, (file, change)) in enumerate(cases.items()):
        path = g.copy("model", f"model-{number}") / file
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
        yield Case("model folder", wrong, g.evaluate(model=str(path.parent)))
    yield Case("model folder", "no such folder or id", g.evaluate(model="nobody/nothing"))
    yield Case("model folder", "no such packaged model", g.evaluate(model="packaged:gemma-9"))
    yield Case("model folder", "an empty name", g.evaluate("--model="))
    yield Case("model folder", "an id that is none", g.evaluate(model="a//b::c"))


def _reports(g: Ground) -> Iterator[Case]:
    results = g.good / "run" / "results.json"
    cases: dict[str, bytes] = {
        "a list": b"[]", "empty file": b"", "half of it": results.read_bytes()[:40],
        "a number changed": _changed(str(results), name="another run"),
        "no format": _changed(str(results), format=None), "a later format": _changed(str(results), format="bad-neurons/results/9"),
        "100,000 brackets": deep(100_000), "Latin-1": b'{"name": "na\xefve"}',
    }  # fmt: skip
    for number, (wrong, content) in enumerate(cases.items()):
        yield Case("results.json", wrong, g.report(Path(g.write(f"results-{number}/results.json", content)).parent))
    yield Case("results.json", "no such folder", g.report(g.root / "nowhere"))
    files: dict[str, tuple[str, bytes]] = {
        "answers.jsonl half": ("evaluation/answers.jsonl", b'{"prompt": '), "neurons.json a list": ("selection/neurons.json", b"[]"),
        "metrics.csv with a word for a number": ("tuning/metrics.csv", b"step,train/ce\n0,x\n"),
        "layers.json empty": ("layers/layers.json", b""),
        "probe's metrics.json of an older version": ("probe/metrics.json", b"{}"),
        "SAE's metrics.json not UTF-8": ("sae/metrics.json", b"\xff"),
    }  # fmt: skip
    for number, (wrong, (file, content)) in enumerate(files.items()):
        folder = g.copy("run", f"report-{number}")
        g.write(f"report-{number}/{file}", content)
        yield Case("run folder", wrong, g.report(folder))


def _judges(g: Ground) -> Iterator[Case]:
    for wrong, more in {
        "nobody listens": [], "no judge": ["--judges", "[]"], "an address without a scheme": ["--base_url", "localhost:80"],
        "another scheme": ["--base_url", "ftp://host/v1"], "a time of 0 s": ["--timeout", "0"], "-1 attempts": ["--attempts", "-1"],
        "a system prompt that is not there": ["--system", "nowhere.txt"], "an unknown test": ["--tests", "[magic]"],
        "no questions there": ["--questions", "nowhere"], "an address with a password": ["--base_url", "https://me:secret-word@host/v1"],
    }.items():  # fmt: skip
        yield Case("judge", wrong, g.judge(*more), keeps=("generated.jsonl",))


def _words(g: Ground) -> Iterator[Case]:
    for wrong, arguments in {
        "no such command": ["tuen"], "an unknown option": g.evaluate("--modle", "x"), "a number in words": g.evaluate("--max_items",
        "many"),
        "a number of 5,000 digits": g.evaluate("--max_items", "9" * 5000), "5,000 brackets": g.evaluate("--max_items", deep(5000).decode()),
        "a share of 2": g.evaluate("--trained_on", g.records, "--test", "2"), "a file name with a NUL": g.evaluate("--delta", "a\0b"),
        "a file name of 10,000 characters": g.evaluate("--delta", "x" * 10_000), "an unknown dtype": g.evaluate("--dtype", "float7"),
        "a token typed": g.evaluate("--model", "hf_abcdefghijklmnopqrstuv"), "an amount of NaN": g.select("--amount", "nan"),
        "a negative amount": g.select("--amount", "-1"), "a layer that is not there": g.select("--way", "random", "--layers", "[99]"),
        "`run` without a file": ["run"], "a text that is not there": g.evaluate("--text", "nowhere.txt"),
        "a place that cannot be written": g.select("--out", f"{g.records}/out"),
    }.items():  # fmt: skip
        yield Case("arguments", wrong, arguments)


def _generated(g: Ground) -> Iterator[Case]:
    """Every artifact cut, with a bit turned over, and with a piece of zeros, at places drawn once and for all."""
    meets = {
        "neurons.json": (g.neurons, g.like), "delta.safetensors": (g.delta, g.export),
        "probe.safetensors": (g.probe, lambda path: g.select("--probe", path)),
        "results.json": (str(g.good / "run" / "results.json"), lambda path: g.report(Path(path).parent)),
    }  # fmt: skip
    draw, count = random.Random(0), 0
    for what, (path, meet) in meets.items():
        size = len(Path(path).read_bytes())
        for _ in range(4):
            share, bit = draw.random(), draw.randrange(8)
            place = int(share * size)
            spoils: dict[str, Spoil] = {
                f"cut after {100 * share:.0f} %": lambda b, p=place: b[:p],
                f"bit {bit} at {100 * share:.0f} %": lambda b, p=place, k=bit: b[:p] + bytes([b[p] ^ 1 << k]) + b[p + 1 :],
                f"16 zeros at {100 * share:.0f} %": lambda b, p=place: (b[:p] + bytes(16) + b[p + 16 :])[: len(b)],
            }
            for wrong, spoil in spoils.items():
                count += 1
                yield Case(f"{what}, generated", wrong, meet(g.spoilt(path, count, spoil)))


def _processes(g: Ground) -> Iterator[Case]:
    bad = g.write("process/bad.jsonl", b"{\n")
    for what, wrong, arguments in (
        ("records (JSONL)", "not JSON", g.evaluate(suites=bad)),
        ("run (YAML)", "aliases that stand for 10^9 values", g.run(g.write("process/run.yaml", bomb()))),
        ("delta.safetensors", "half of it", g.export(g.write("process/delta.safetensors", Path(g.delta).read_bytes()[:500]))),
        ("neurons.json", "100,000 brackets", g.like(g.write("process/neurons.json", deep(100_000)))),
    ):
        yield Case(f"{what}, own process", wrong, arguments, process=True)
