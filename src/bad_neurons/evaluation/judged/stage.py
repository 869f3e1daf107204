"""``bad-neurons judge``: Syco-Bench's four tests on one model, before against after, with generated answers and judges.

Both what the model wrote and what the judges said is kept as it comes, in ``generated.jsonl`` and ``verdicts.jsonl``: the same
command goes on where it was stopped, and another judge costs only its own questions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from bad_neurons.artifacts import digest_json, digest_path, write_json, write_jsonl
from bad_neurons.data.readers.syco_bench import read_questions
from bad_neurons.errors import UserError
from bad_neurons.evaluation.evaluate import neurons_summary
from bad_neurons.evaluation.generate import greedy_answers
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.numbers import results_of
from bad_neurons.evaluation.judged.panel import Panel
from bad_neurons.evaluation.judged.tests import Item, TestName, items_of, median_score
from bad_neurons.formats import JUDGED
from bad_neurons.models.load import Dtype, LanguageModel, load_model
from bad_neurons.reading import read_text
from bad_neurons.tuning.delta_file import load_delta

log = logging.getLogger(__name__)

_TOGETHER = 16  # prompts that are answered at once; always the same ones, so that an interruption changes nothing


class Answer(NamedTuple):
    """What the model said to one prompt.

    Attributes:
        item: the prompt.
        when: ``before`` or ``after`` the delta.
        text: the answer.
    """

    item: Item
    when: str
    text: str


def judge(
    model: str,
    delta: str | None = None,
    tests: list[TestName] = ["pickside", "mirror", "whosaid", "delusion"],  # noqa: B006 (read only)
    questions: str = "",
    system: str | None = None,
    max_questions: int = 0,
    max_new_tokens: int = 256,
    out: str = "runs/judge",
    dtype: Dtype = "auto",
    **panel: Any,
) -> dict[str, Any]:
    """Let a model answer Syco-Bench, with and without a delta, let judges score the answers, and write ``results.json``.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        delta: ``delta.safetensors`` of a tuning stage; without one only ``before`` is measured.
        tests: which of the four tests.
        questions: folder of ``questions_<test>.csv``; empty means the one below ``BAD_NEURONS_DATA``.
        system: text file with a system prompt; as published, ``delusion`` is asked without it.
        max_questions: only the first so many questions of a test; 0 means all.
        max_new_tokens: length of an answer at most, in tokens.
        out: folder for ``results.json``, ``judged.jsonl``, and what is kept for the next time.
        dtype: dtype of the model.
        **panel: the judges, see :class:`bad_neurons.evaluation.judged.panel.Panel`.

    Raises:
        UserError: questions that cannot be read, a delta of another model, or a judge that cannot be had.
    """
    start = time.monotonic()
    judges = Panel(**panel)
    if max_new_tokens < 1 or max_questions < 0 or not tests:
        raise UserError(f"--max_new_tokens {max_new_tokens}, --max_questions {max_questions}, --tests {tests}: at least 1, 0 and one test")
    rows = {test: read_questions(test, questions)[: max_questions or None] for test in dict.fromkeys(tests)}
    items = [item for test, some in rows.items() for item in items_of(test, some)]
    folder = Path(out)
    answers, neurons = _answers(model, delta, dtype, items, _system(system), max_new_tokens, Kept(folder / "generated.jsonl"))
    judged = _judged(answers, judges, Kept(folder / "verdicts.jsonl"))
    write_jsonl(folder / "judged.jsonl", judged)
    missing = _missing(judged)
    results = {
        "format": JUDGED,
        "model": model,
        "inputs": {"delta": digest_path(delta) if delta else None},
        "files": {"judged.jsonl": digest_path(folder / "judged.jsonl")},
        "neurons": neurons,
        "system": system,
        "max_new_tokens": max_new_tokens,
        "judges": list(judged[0]["scores"]),
        "tests": results_of(judged),
        "missing": missing,
        "seconds": {"judge": round(time.monotonic() - start, 1)},
    }
    write_json(folder / "results.json", results)
    return results


def _missing(judged: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Which answers some judge gave no score, each with the judge; the first of them are logged."""
    names = ("test", "topic", "side", "when")
    found = [
        {"judge": judge, **{name: row[name] for name in names}}
        for row in judged
        for judge, score in row["scores"].items()
        if score is None and row["answer"]
    ]
    for one in found[:5]:
        log.warning("no score by %(judge)s: %(test)s, %(topic)s, %(side)s, %(when)s the delta", one)
    if found:
        log.warning("%d answers have no score; the same command asks for those again", len(found))
    return found


def _system(path: str | None) -> str | None:
    if path is None:
        return None
    return read_text(path, "a text file with a system prompt (--system)").strip()


def _answers(
    model: str, delta: str | None, dtype: Dtype, items: Sequence[Item], system: str | None, max_new_tokens: int, kept: Kept
) -> tuple[list[Answer], dict[str, Any] | None]:
    """The model's answers before and after, and what there is to say of the delta's neurons. The model is gone afterwards."""
    lm = load_model(model, dtype)
    loaded = load_delta(lm.model, delta) if delta else None
    prompts = [item.turns(system) for item in items]
    answers: list[Answer] = []
    for when in ("before", "after") if loaded else ("before",):
        edit = digest_path(delta) if delta and when == "after" else None
        with loaded.disabled() if loaded and when == "before" else nullcontext():
            keys = [digest_json([lm.digest, str(lm.model.dtype), edit, turns, max_new_tokens]) for turns in prompts]
            texts = _generate(lm, prompts, keys, max_new_tokens, kept, f"answers {when}")
            answers += [Answer(item, when, text) for item, text in zip(items, texts, strict=True)]
    return answers, neurons_summary(loaded) if loaded else None


def _generate(lm: LanguageModel, prompts: Sequence[Any], keys: Sequence[str], max_new_tokens: int, kept: Kept, what: str) -> list[str]:
    """An answer to each prompt; where one of those that are answered together is missing, all of them are answered again."""
    for start in tqdm(range(0, len(prompts), _TOGETHER), desc=what, unit="batch"):
        span = slice(start, start + _TOGETHER)
        if any(key not in kept for key in keys[span]):
            texts = greedy_answers(lm.model, lm.tokenizer, prompts[span], max_new_tokens)
            for key, text in zip(keys[span], texts, strict=True):
                if key not in kept:
                    kept.put(key, {"answer": text})
    return [str(kept[key]["answer"]) for key in keys]


def _judged(answers: Sequence[Answer], judges: Panel, kept: Kept) -> list[dict[str, Any]]:
    """One row an answer: what was asked and said, the score of each judge, and their median. An empty answer is not judged."""
    said = [number for number, answer in enumerate(answers) if answer.text]
    if not said:
        raise UserError("judge: the model gave no answer at all; another model, or more --max_new_tokens")
    scores: list[dict[str, float | None]] = [{} for _ in answers]
    for name, given in judges.scores([answers[n].item.asked_of_judge(answers[n].text) for n in said], kept).items():
        of_answer = dict(zip(said, given, strict=True))
        for number, row in enumerate(scores):
            row[name] = of_answer.get(number)
    return [
        {
            "test": item.test, "topic": item.topic, "side": item.side, "when": when, "prompt": item.prompt, "answer": text,
            "scores": row, "median": median_score(row.values()),
        }
        for (item, when, text), row in zip(answers, scores, strict=True)
    ]  # fmt: skip
