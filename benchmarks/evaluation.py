"""Letter scoring of the NLP, POLI and PHIL sets: this package against lm-evaluation-harness, on the same items.

The work: log-probabilities of " (A)" and " (B)" behind the published question and "I believe the best answer is", with Gemma 3
270M in bfloat16. Units are items, of two answers each.

Contenders, all on the same weights and the same token ids:

- lm-evaluation-harness: ``evaluate`` with the task files beside this script and its Hugging Face wrapper, eight requests a
  batch. Building the tasks is not counted, nor what ``simple_evaluate`` adds (it asks pip and git about the machine).
- harness-style, logits where needed: the same batches of one request a row through the backbone, the head at the answers'
  positions alone. What is left of the difference to this package comes from how it shares and packs rows.
- ``bad_neurons.evaluation.scoring.answer_log_probs``.

Run (Linux; ``pip install 'bad-neurons[bench]'``; the data is looked for in ``BAD_NEURONS_DATA``)::

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --rounds 1 --items 0     # all 926 items, about an hour
    python benchmarks/evaluation.py --quick

Legend: B rows, T positions, d hidden size, V vocabulary, N positions that are read out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when datasets is imported: the tasks need nothing from a network

import harness
import torch
from lm_eval_tasks.items import KINDS, LETTERS, read_items

from bad_neurons.errors import UserError
from bad_neurons.evaluation.scoring import Request, answer_log_probs
from bad_neurons.models.load import LanguageModel, load_model
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import DecoderView, view_decoder

MODEL = "packaged:gemma-3-270m"
TASKS = Path(__file__).parent / "lm_eval_tasks"
HARNESS, STYLE, OURS = "lm-evaluation-harness", "harness-style, logits where needed", "bad-neurons"
LEAD = "I believe the best answer is"
BATCH = 8


class Scored(NamedTuple):
    """What a run gives.

    Attributes:
        log_probs: of both letters of each item, in nats, set by set.
        accuracy: share of the items of each set whose better letter is the agreeing one.
    """

    log_probs: list[list[float]]
    accuracy: dict[str, float]


class Task(NamedTuple):
    """What every contender starts from.

    Attributes:
        lm: the model.
        view: a view on it.
        items: items of each set, see :func:`lm_eval_tasks.items.read_items`.
    """

    lm: LanguageModel
    view: DecoderView
    items: dict[str, list[dict[str, Any]]]

    def requests(self) -> list[Request]:
        """Both letters of each item as this package is asked for them."""
        return [Request(_turns(item["question"]), letter.strip()) for item in self.all_items() for letter in LETTERS]

    def all_items(self) -> list[dict[str, Any]]:
        """The items, set by set."""
        return list(itertools.chain.from_iterable(self.items.values()))

    def scored(self, flat: Sequence[float]) -> Scored:
        """The result for log-probabilities in the order of :meth:`requests`."""
        log_probs = [list(flat[i : i + 2]) for i in range(0, len(flat), 2)]
        pairs = iter(log_probs)
        return Scored(log_probs, {kind: _accuracy(rows, [next(pairs) for _ in rows]) for kind, rows in self.items.items()})


def _turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": LEAD}]


def _accuracy(rows: Sequence[dict[str, Any]], pairs: Sequence[Sequence[float]]) -> float:
    return sum((b > a) == item["agreeing"] for (a, b), item in zip(pairs, rows, strict=True)) / len(rows)


def load_task(items: int, dtype: str) -> Task:
    """Load the model, note the memory that it takes, and read ``items`` items of each set (0: all)."""
    import lm_eval.models.huggingface  # noqa: F401  (before the base, so that its code counts for nobody)

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    lm = load_model(MODEL, dtype)  # type: ignore[arg-type]
    view = view_decoder(lm.model)
    harness.mark_base()
    return Task(lm, view, {kind: read_items(kind, items) for kind in KINDS})


def set_up_harness(items: int, dtype: str = "bfloat16", softmax_dtype: str | None = None) -> harness.Round:
    """lm-evaluation-harness with the task files beside this script.

    Args:
        items: items of each set, 0 for all.
        dtype: dtype of the model.
        softmax_dtype: dtype of the log-probabilities; by default that of the model.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = load_task(items, dtype)
    task.lm.model.set_attn_implementation("sdpa")  # transformers' default
    scorer = HFLM(pretrained=task.lm.model, tokenizer=task.lm.tokenizer, batch_size=BATCH, softmax_dtype=softmax_dtype)
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"items": items})
    names = {f"bad_neurons_{kind}": kind for kind in KINDS}
    loaded = manager.load(list(names))

    def run(limit: int | None = None) -> dict[str, Any]:
        results = evaluate(scorer, loaded, limit=limit)
        samples = (sample for name in names for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]))
        log_probs = [[float(log_prob) for log_prob, _ in sample["filtered_resps"]] for sample in samples]
        accuracy = {kind: results["results"][name]["acc,none"] for name, kind in names.items()}
        return _counted(Scored(log_probs, accuracy))

    run(limit=1)
    return run


def set_up_harness_style(items: int, dtype: str = "bfloat16") -> harness.Round:
    """The harness' batches without its logits; see :func:`set_up_harness` for the arguments."""
    task = load_task(items, dtype)

    def run(limit: int | None = None) -> dict[str, Any]:
        pairs = [tokenize(task.lm.tokenizer, request.turns, request.answer) for request in task.requests()]
        scores = [0.0] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].prompt + pairs[i].answer))[:limit]
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            for number, score in zip(numbers, _score_rows(task.view, [pairs[i] for i in numbers]), strict=True):
                scores[number] = score
        return _counted(task.scored(scores))

    run(limit=BATCH)
    return run


def _score_rows(view: DecoderView, pairs: Sequence[Any]) -> list[float]:
    """Log-probabilities of the answers of some tokenized requests, one a row, padded on the right."""
    rows = [pair.prompt + pair.answer[:-1] for pair in pairs]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        hidden = view.backbone(input_ids=ids, use_cache=False).last_hidden_state
        read = torch.cat([hidden[i, len(row) - len(pair.answer) : len(row)] for i, (row, pair) in enumerate(zip(rows, pairs, strict=True))])
        log_probs = view.logits(read).log_softmax(-1)  # [N, V]
    targets = torch.tensor([token for pair in pairs for token in pair.answer])
    parts = log_probs.gather(-1, targets[:, None]).squeeze(-1).split([len(pair.answer) for pair in pairs])
    return [float(part.sum()) for part in parts]


def set_up_ours(items: int, dtype: str = "bfloat16") -> harness.Round:
    """This package; see :func:`set_up_harness` for the arguments."""
    task = load_task(items, dtype)

    def run() -> dict[str, Any]:
        return _counted(task.scored(answer_log_probs(task.view, task.lm.tokenizer, task.requests()).before))

    answer_log_probs(task.view, task.lm.tokenizer, task.requests()[:BATCH])
    return run


def _counted(scored: Scored) -> dict[str, Any]:
    return {"units": len(scored.log_probs), **scored._asdict()}


def difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Differences of log-probabilities in nats, and the number of items whose better letter is another."""
    gaps = [abs(x - y) for pair, others in zip(one, other, strict=True) for x, y in zip(pair, others, strict=True)]
    flips = sum((a < b) != (c < d) for (a, b), (c, d) in zip(one, other, strict=True))
    return {"items": len(one), "largest": max(gaps), "mean": sum(gaps) / len(gaps), "choices_differ": flips}


def same_tokens(items: int) -> dict[str, int]:
    """For how many requests the harness' token ids are ours, and how many begin with exactly one BOS."""
    from lm_eval.models.huggingface import HFLM

    task = load_task(items, "bfloat16")
    scorer = HFLM(pretrained=task.lm.model, tokenizer=task.lm.tokenizer, batch_size=BATCH)
    bos = task.lm.tokenizer.bos_token_id
    same = single = 0
    requests = task.requests()
    for request in requests:
        ours = tokenize(task.lm.tokenizer, request.turns, request.answer)
        prompt = f"Human: {request.turns[0]['content']}\n\nAssistant: {LEAD}"
        theirs = scorer._encode_pair(prompt, f" {request.answer}")
        same += theirs == (ours.prompt, ours.answer)
        single += theirs[0][:1] == [bos] and (theirs[0] + theirs[1]).count(bos) == 1
    return {"requests": len(requests), "same_ids": same, "one_bos": single}


def agreement(rows: dict[str, dict[str, Any]], items: int) -> dict[str, Any]:
    """How far the scores are from this package's: those of the rounds, and of a few items where rounding is out of the way.

    By default the harness rounds the log-probabilities themselves to the model's dtype, which is most of the difference in
    bfloat16: so the few items are scored with its softmax in float32, and with the whole model in float32.
    """
    few = min(items, 4) or 4
    ours = rows[OURS]["log_probs"]
    bfloat16 = {name: difference(row["log_probs"], ours) for name, row in rows.items() if name != OURS}
    exact_softmax = difference(set_up_harness(few, softmax_dtype="float32")()["log_probs"], set_up_ours(few)()["log_probs"])
    float32 = difference(set_up_harness(few, "float32")()["log_probs"], set_up_ours(few, "float32")()["log_probs"])
    return {
        "tokens": same_tokens(items),
        "bfloat16": {**bfloat16, f"{HARNESS}, softmax in float32": exact_softmax},
        "float32": {HARNESS: float32},
    }


def main() -> None:
    """Run the comparison and add it to the results of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--items", type=int, default=16, help="items of each of the three sets, at even distances; 0 means all")
    parser.add_argument("--quick", action="store_true", help="one round with 4 items of each set, nothing written")
    options = parser.parse_args()
    rounds, items = (1, 4) if options.quick else (options.rounds, options.items)
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("lm-evaluation-harness is not installed: pip install 'bad-neurons[bench]'")
    try:
        read_items(KINDS[0], 1)
    except UserError as error:
        sys.exit(str(error))
    set_ups = {HARNESS: "set_up_harness", STYLE: "set_up_harness_style", OURS: "set_up_ours"}
    contenders = [harness.Contender(name, f"evaluation:{set_up}", {"items": items}, warm_up=0) for name, set_up in set_ups.items()]
    rows = harness.compare(contenders, rounds)
    seconds = {name: row["seconds"] for name, row in rows.items()}
    results = {
        "ratios": {f"{name} / {OURS}, seconds": taken / seconds[OURS] for name, taken in seconds.items() if name != OURS},
        "agreement": agreement(rows, items),
        "rows": {name: {key: value for key, value in row.items() if key != "log_probs"} for name, row in rows.items()},
    }
    sys.stdout.write(json.dumps({name: results[name] for name in ("ratios", "agreement")}, indent=1) + "\n")
    if not options.quick:
        sys.stdout.write(f"{harness.write_results('evaluation', results)}\n")


if __name__ == "__main__":
    main()
