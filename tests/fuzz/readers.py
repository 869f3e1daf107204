"""Every reader of bytes as one function: it reads them, or refuses with the one-line error, and nothing else happens."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bad_neurons import formats
from bad_neurons.artifacts import read_json, read_tensors
from bad_neurons.checkpoints import SealedCheckpoints
from bad_neurons.data.readers import load_records
from bad_neurons.data.records import read_records
from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.endpoint import _content, _retry_after
from bad_neurons.evaluation.judged.judge import parse_score
from bad_neurons.evaluation.judged.published import read_published
from bad_neurons.plan import read_run_config
from bad_neurons.probe.module import read_probe, write_probe
from bad_neurons.report.html import write_report
from bad_neurons.sae.load import load_saes
from bad_neurons.selection.neurons import NeuronSelection, read_neurons, write_neurons
from bad_neurons.stages import _load_yaml
from bad_neurons.testing import save_tiny_saes
from bad_neurons.tuning.delta_file import read_delta, write_delta

Reader = Callable[[Path], Any]  # of a file, which must have the name that the reader is known by


def _sae(path: Path) -> None:
    """``path`` is ``layer-1/<file>`` in a folder that has the other files."""
    load_saes(str(path.parent.parent), [1], 16)


def _report(path: Path) -> None:
    write_report(path.parent)


def _judge(path: Path) -> None:
    """What an endpoint replied; the refusals of its functions are those that the judge takes for a bad reply."""
    body = path.read_bytes()
    with suppress(ValueError, KeyError, IndexError, TypeError):
        parse_score(_content(body), -5, 5)
    parse_score(body.decode("utf-8", "replace"), -5, 5)
    _retry_after(body.decode("latin-1"))


def _options(path: Path) -> None:
    with suppress(ValueError):
        _load_yaml(path.read_bytes().decode("utf-8", "replace"))


READERS: dict[str, tuple[str, Reader]] = {  # by kind: name of the file, and what reads it
    "records": ("records.jsonl", read_records),
    "anthropic": ("sycophancy_on_nlp_survey.jsonl", lambda path: load_records(f"anthropic:nlp@{path}")),
    "truthfulqa": ("TruthfulQA.csv", lambda path: load_records(f"truthfulqa@{path}")),
    "open-ended": ("open.csv", lambda path: load_records(f"open-ended@{path}")),
    "pickside": ("questions_pickside.csv", lambda path: load_records(f"syco-bench:pickside@{path}")),
    "published": ("delusion.csv", lambda path: read_published("delusion", path.parent)),
    "run": ("run.yaml", read_run_config),
    "options": ("options.yaml", _options),
    "neurons": ("neurons.json", read_neurons),
    "results": ("results.json", _report),
    "json": ("value.json", lambda path: read_json(path, "a value")),
    "delta": ("delta.safetensors", read_delta),
    "probe": ("probe.safetensors", read_probe),
    "shard": ("shard.safetensors", lambda path: read_tensors(path, formats.SHARD)),
    "checkpoint": ("last.ckpt", SealedCheckpoints().load_checkpoint),
    "kept": ("verdicts.jsonl", Kept),
    "sae weights": ("layer-1/sae_weights.safetensors", _sae),
    "sae configuration": ("layer-1/cfg.json", _sae),
    "judge": ("reply.json", _judge),
}


def read(kind: str, path: Path) -> str | None:
    """Read a file; what the refusal says, or None where it was read. Anything else that is raised goes through."""
    try:
        READERS[kind][1](path)
    except UserError as error:
        said = str(error)
        assert said, "a refusal without words"
        assert len(said) < 1100, "a refusal that nobody can read"
        assert said.isprintable(), "a refusal of several lines"
        return said
    return None


def write_good(folder: Path) -> dict[str, Path]:
    """A good file of each kind, by kind."""
    row = {"prompt": "Is tea hot?", "honest": "Yes.", "contrarian": "No.", "topic": "tea", "person_is_right": True}
    opener = "Do you agree or disagree with the following claim about the field of Natural Language Processing"
    question = f"Hello, I am Ann. {opener}?\n\n(A) Yes\n(B) No\n\nAnswer:"
    asked = {"question": question, "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
    scores = [f"judge{number}_score" for number in (1, 2, 3)]
    texts: dict[str, str] = {
        "records": json.dumps(row) + "\n", "anthropic": json.dumps(asked) + "\n",
        "truthfulqa": _csv(["Category", "Question", "Best Answer", "Best Incorrect Answer"], ["tea", "Is it hot?", "Yes", "No"]),
        "open-ended": _csv(["prompt", "sycophantic", "not_sycophantic", "agreeing_type"], ["a", "b", "c", "1"]),
        "pickside": _csv(["statement1", "statement2"], ["tea is best", "coffee is best"]),
        "published": _csv(["Name", "statement", "response", *scores, "median_score"], ["m", "s", "r", *"1232"]),
        "run": "model: x\nlayers: [1, 2]\nout: y\ntune:\n  model: &m {lr: 1.0e-3}\n  data: *m\n", "options": "model: x\nlayers: [1, 2]\n",
        "json": '{"a": [1, 2.5, null, "\\u00e9"]}', "judge": json.dumps({"choices": [{"message": {"role": "assistant", "content": "3"}}]}),
    }  # fmt: skip
    paths = {kind: folder / kind.replace(" ", "-") / name for kind, (name, _) in READERS.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    for kind, text in texts.items():
        paths[kind].write_text(text, encoding="utf-8")
    _write_tensors(paths)
    return paths


def _csv(*rows: list[str]) -> str:
    handle = SimpleNamespace(text="")
    csv.writer(SimpleNamespace(write=lambda part: setattr(handle, "text", handle.text + part))).writerows(rows)
    return handle.text


def _write_tensors(paths: dict[str, Path]) -> None:
    from bad_neurons.artifacts import write_json, write_tensors

    chosen = NeuronSelection("residual", {1: [0, 5]}, 16, [1], "tiny", "ab12", {"name": "top_p", "amount": 0.2})
    write_neurons(paths["neurons"], chosen)
    write_delta(paths["delta"], chosen, {"layers.1.gate_proj": torch.ones(4, 2), "layers.1.down_proj": torch.ones(2, 4)})
    write_probe(paths["probe"], {1: torch.ones(8)}, 0.5, {"layers": [1]})
    write_tensors(paths["shard"], {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(0, 4)}, {"format": formats.SHARD, "key": "k"})
    write_json(paths["results"], {"format": formats.RESULTS, "name": "a run", "suites": {}})
    SealedCheckpoints().save_checkpoint({"state_dict": {"a": torch.ones(3)}, "epoch": 1, "more": [1.5, "x", None]}, paths["checkpoint"])
    Kept(paths["kept"]).put("a", {"score": 1.0, "reply": "1"})
    for kind in ("sae weights", "sae configuration"):
        folder = paths[kind].parent.parent
        save_tiny_saes(folder, [1])
        (folder / "layer-1" / "seal.json").unlink()  # which would refuse every change before anything is parsed
