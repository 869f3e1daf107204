"""The evaluation stage: before against after, with side effects, on one model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bad_neurons.artifacts import digest_path, write_json, write_jsonl
from bad_neurons.data.readers import PUBLIC, available, parse_source
from bad_neurons.data.records import Record
from bad_neurons.data.splits import measured_records
from bad_neurons.data.text import load_paragraphs
from bad_neurons.data.tuning import draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.evaluation.generate import greedy_answers
from bad_neurons.evaluation.side_effects import side_effects
from bad_neurons.evaluation.suites import score_items, suite_of
from bad_neurons.evaluation.suites.beliefs import accuracy_effects
from bad_neurons.formats import RESULTS
from bad_neurons.models.load import Dtype, LanguageModel, in_float32, load_model
from bad_neurons.models.prompts import readable
from bad_neurons.models.view import view_decoder
from bad_neurons.ranks import Rank, join
from bad_neurons.tuning.delta_file import LoadedDelta, load_delta

log = logging.getLogger(__name__)


def evaluate(
    model: str,
    delta: str | None = None,
    suites: list[str] = ["embedded"],  # noqa: B006 (read only; jsonargparse shows it in --help)
    optional_suites: list[str] = PUBLIC,
    trained_on: str | None = "embedded",
    out: str = "runs/evaluation",
    validation: float = 0.2,
    test: float = 0.2,
    split_seed: int = 0,
    max_items: int = 0,
    text: str | None = "python-docs",
    max_paragraphs: int = 40,
    answers: int = 10,
    dtype: Dtype = "auto",
    devices: int = 0,
) -> dict[str, Any]:
    """Measure a model, with and without a delta where one is given, and write ``results.json`` and ``items.jsonl``.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        delta: ``delta.safetensors`` of a tuning stage; without one only ``before`` is measured.
        suites: sources of records that must be measured.
        optional_suites: sources that are measured where their files are on this machine, and left out with a note else.
        trained_on: source that probe and tuning learned from, or several with commas between them; only their test topics are
            measured. None: all topics of all.
        out: folder for the results.
        validation: share of validation topics of ``trained_on``.
        test: share of test topics of ``trained_on``.
        split_seed: seed of the division of topics.
        max_items: at most so many items of a suite, drawn evenly over topics; 0 means all.
        text: source of the unrelated text for KL and perplexity; None leaves them out.
        max_paragraphs: paragraphs of it that are read.
        answers: real answers written to ``answers.jsonl``, from the first suite.
        dtype: dtype of the model.
        devices: processes on this machine, each on a device of its own, that share the work; 0 is as many as torchrun or srun has
            started, and one where they have not. Each item is measured once, and the numbers are those of one process.

    Raises:
        UserError: the delta belongs to another model, or a suite cannot be read.
    """
    start = time.monotonic()
    rank = join(devices)
    records = _read_suites(suites, optional_suites, trained_on, (validation, test, split_seed), max_items)
    lm = load_model(model, dtype, rank.device)
    view = view_decoder(lm.model)
    loaded = load_delta(lm.model, delta) if delta else None
    scored = score_items(view, lm.tokenizer, records, loaded, rank=rank)
    items = {source: {when: rows for when, rows in sides._asdict().items() if rows} for source, sides in scored.items()}
    results: dict[str, Any] = {
        "format": RESULTS,
        "model": model,
        "inputs": {"model": lm.digest, "delta": digest_path(delta) if delta else None},
        "neurons": neurons_summary(loaded) if loaded else None,
        "suites": {
            suite_name(source): {when: suite_of(source).summarise(rows) for when, rows in sides.items()} for source, sides in items.items()
        },
    }
    effects = accuracy_effects(scored)
    if text:
        paragraphs = load_paragraphs(text, "measure")[:max_paragraphs]
        with in_float32(lm.model):
            effects = side_effects(view, lm.tokenizer, paragraphs, loaded, rank=rank) | effects
    if effects:
        results["side_effects"] = effects
    texts = _answers(lm, loaded, draw_evenly(next(iter(records.values())), answers, split_seed), rank) if answers else []
    results["seconds"] = {"evaluation": round(time.monotonic() - start, 1)}
    if rank.number == 0:
        if answers:
            write_jsonl(Path(out) / "answers.jsonl", texts)
        write_jsonl(Path(out) / "items.jsonl", _item_rows(items))
    rank.wait()
    written = ("items.jsonl", "answers.jsonl") if answers else ("items.jsonl",)
    results["files"] = {name: digest_path(Path(out) / name) for name in written}
    if rank.number == 0:
        write_json(Path(out) / "results.json", results)
    rank.wait()
    return results


def suite_name(source: str) -> str:
    """Short name of a suite: ``anthropic:phil`` is ``phil``, a file is its stem."""
    scheme, rest = parse_source(source)
    return (rest.partition("@")[0] or scheme) if scheme else Path(rest).stem


def neurons_summary(loaded: LoadedDelta) -> dict[str, Any]:
    """What ``results.json`` says about the edited neurons."""
    chosen = loaded.selection
    counts = {str(layer): len(indices) for layer, indices in chosen.layers.items()}
    return {"axis": chosen.axis, "count": chosen.count, "share": chosen.share, "layers": counts}


def _read_suites(
    suites: Sequence[str], optional: Sequence[str], trained_on: str | None, division: tuple[float, float, int], max_items: int
) -> dict[str, list[Record]]:
    here = [source for source in optional if available(source)]
    if absent := sorted(set(optional) - set(here)):
        log.info("not measured: %s (no files here; set BAD_NEURONS_DATA to the folder that holds them)", ", ".join(absent))
    records: dict[str, list[Record]] = {}
    for source in dict.fromkeys([*suites, *here]):
        if suite_name(source) in map(suite_name, records):
            raise UserError(f"--suites: {source} is the second one called {suite_name(source)!r}; rename its file")
        records[source] = draw_evenly(measured_records(source, trained_on, *division), max_items, division[2])
    if not records:
        raise UserError("--suites: nothing to measure; give at least one source, such as embedded")
    return records


def _item_rows(items: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return [
        {"suite": suite_name(source), "when": when, **row}
        for source, sides in items.items()
        for when, rows in sides.items()
        for row in rows
    ]


def _answers(lm: LanguageModel, loaded: LoadedDelta | None, records: list[Record], rank: Rank) -> list[dict[str, Any]]:
    prompts = [record.prompt for record in records]
    off: AbstractContextManager[Any] | None = loaded.disabled() if loaded else None
    if off is None:
        before, after = greedy_answers(lm.model, lm.tokenizer, prompts, rank=rank), None
    else:
        with off:
            before = greedy_answers(lm.model, lm.tokenizer, prompts, rank=rank)
        after = greedy_answers(lm.model, lm.tokenizer, prompts, rank=rank)
    return [
        {"prompt": readable(r.prompt), "person_is_right": r.person_is_right, "before": b} | ({"after": after[i]} if after else {})
        for i, (r, b) in enumerate(zip(records, before, strict=True))
    ]
