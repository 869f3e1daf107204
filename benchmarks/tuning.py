"""Tuning: the same neurons, data and loss by masked full matrices with a second model, by peft, and by this package.

The work: an epoch over PHIL records, AdamW on CE(honest answer) + KL(clean || tuned) over the answer tokens, the MLPs of the
same layers of Gemma 3 270M in bfloat16: from a third of the depth upwards, and in the last third. Units are the tokens of the
records, each counted once and padding never, whoever reads it and however often.

Contenders (see :mod:`tuning_competitors`; all batches hold records of similar length, about 1,000 tokens):

- 3 % of the residual indices: full matrices under a gradient mask, AdamW over them, and a second model for the KL.
- peft's LoRA (rank 16) and SHiRA (as many values as 3 % are) on the same matrices, ``disable_adapter()`` for the KL.
- ``NeuronTuner`` on the same 3 %: in the first epoch, when nothing of the clean model is kept yet, and in later ones (``cached``).

The competitors run as people write them (``written``: labels passed to transformers, logits for every token), and with the
head at supervised positions only (``needed``), so that one sees what comes from where. Beside them: what Lightning's
checkpoints weigh, and how a step of ours grows with tokens and with edited layers.

Run (Linux; the data is looked for in ``BAD_NEURONS_DATA``; needs 20 GB of memory)::

    python benchmarks/tuning.py
    python benchmarks/tuning.py --rounds 5 --records 64
    python benchmarks/tuning.py --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness import Contender, Round, compare, write_results
from tuning_common import ALPHA, D_MODEL, LAYERS, LR, MODEL, RECORDS, Losses, chosen_indices, epochs, saved, settle

from bad_neurons.data.readers import available
from bad_neurons.data.tuning import SycophancyDataModule, TuningBatch
from bad_neurons.selection.neurons import NeuronSelection
from bad_neurons.tuning.clean_cache import CleanCache
from bad_neurons.tuning.module import NeuronTuner

FROM_A_THIRD, LAST_THIRD = tuple(range(6, LAYERS)), tuple(range(12, LAYERS))
BATCH_TOKENS = 1024  # tokens of our batches: about the competitors' eight records
CE_ROUNDING = 0.01  # nats; hidden states in bfloat16 have 8 bits
MASKED, LORA, SHIRA, OURS = "masked matrices + second model", "peft LoRA", "peft SHiRA", "bad-neurons"
FIRST, CACHED = f"{OURS}, first epoch", f"{OURS}, cached"


def ours_setup(layers: Sequence[int], cached: bool, count: int, compiled: bool = False) -> Round:
    """NeuronTuner: the chosen rows and columns alone. Without ``cached`` every round is a first epoch."""
    tuner, batches = _tuner(compiled), _batches(count)
    tuner.attach_neurons(_selection(tuner, layers))
    epoch = epochs(batches, tuner.edit.trainable(), _losses(tuner))  # type: ignore[union-attr]

    def run() -> Mapping[str, Any]:
        if not cached:
            tuner.clean_cache = CleanCache(tuner.cache_bytes, None, "first epoch")
        return epoch()

    return run


def ours_checkpoint_setup(layers: Sequence[int]) -> Round:
    """Lightning's checkpoint of NeuronTuner."""
    tuner = _tuner()
    tuner.attach_neurons(_selection(tuner, layers))
    return saved(tuner, _batches(8))


def growth_setup(layer_counts: Sequence[int], record_counts: Sequence[int], repeats: int) -> Round:
    """Seconds of one step of ours, clean pass cached: by number of edited layers (from the last one down), by tokens."""
    tuner = _tuner()
    batches = {count: _batches(count, batch_tokens=2**30)[0] for count in record_counts}

    def step_seconds(layers: int, batch: TuningBatch) -> float:
        edit = tuner.attach_neurons(_selection(tuner, range(LAYERS - layers, LAYERS)))
        step = epochs([batch], edit.trainable(), _losses(tuner))
        step()  # fills the cache and the optimizer's state
        seconds = statistics.median(_seconds(step) for _ in range(repeats))
        edit.remove()
        return seconds

    def run() -> Mapping[str, Any]:
        middle = batches[record_counts[len(record_counts) // 2]]
        by_layers = [(layers, step_seconds(layers, middle)) for layers in layer_counts]
        by_tokens = [(int(b.rows.attention_mask.sum()), step_seconds(len(FROM_A_THIRD), b)) for b in batches.values()]
        return {"by_layers": by_layers, "by_tokens": by_tokens}

    return run


def _tuner(compiled: bool = False) -> NeuronTuner:
    tuner = NeuronTuner(MODEL, alpha=ALPHA, beta=0.0, kl_on="answer", lr=LR, dtype="bfloat16", compile=compiled)
    settle(tuner.lm)
    return tuner


def _batches(count: int, batch_tokens: int = BATCH_TOKENS) -> list[TuningBatch]:
    data = SycophancyDataModule(MODEL, RECORDS, max_records=count, batch_tokens=batch_tokens, retention=None)
    data.setup("fit")
    return list(data.train_dataloader())


def _losses(tuner: NeuronTuner) -> Callable[[TuningBatch], Losses]:
    def losses(batch: TuningBatch) -> Losses:
        sums, answers = tuner.losses(batch), int(batch.answer.sum())
        return Losses(sums.loss / answers, sums.ce / answers, sums.kl / answers, answers)

    return losses


def _selection(tuner: NeuronTuner, layers: Sequence[int]) -> NeuronSelection:
    return NeuronSelection(
        axis="residual", layers=chosen_indices(layers), size=D_MODEL, candidates=list(layers), model_id=tuner.model_id,
        model_digest=tuner.model_digest, rule={"name": "random"},
    )  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def contenders(layers: tuple[int, ...], form: str, count: int) -> list[Contender]:
    """Who takes turns with whom: everybody at once would not fit into 24 GB, so ours runs beside each form."""
    those: dict[str, Any] = {"layers": layers, "count": count}

    def named(name: str, setup: str, **options: Any) -> Contender:
        return Contender(f"layers {layers[0]}-{layers[-1]}, {form}: {name}", setup, {**those, **options})

    found = [
        named(MASKED, "tuning_competitors:masked_setup", form=form),
        named(LORA, "tuning_competitors:peft_setup", form=form, method="lora"),
        named(CACHED, "tuning:ours_setup", cached=True),
    ]
    if form == "written" and layers == FROM_A_THIRD:
        found.insert(2, named(SHIRA, "tuning_competitors:peft_setup", form=form, method="shira"))
        found.append(named(FIRST, "tuning:ours_setup", cached=False))
    return found


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Each competitor's seconds and memory over ours beside it; the tokens are the same, so seconds are tokens a second."""
    found = {}
    for ours in (name for name in rows if OURS in name):
        beside = ours.partition(": ")[0]
        for theirs in (name for name in rows if name.startswith(f"{beside}: ") and OURS not in name):
            for what in ("seconds", "peak_bytes"):
                found[f"{theirs} / {ours.partition(': ')[2]}, {what}"] = rows[theirs][what] / rows[ours][what]
    return found


def check_agreement(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """That all did the same work: the same tokens, and the same losses of the untouched model.

    Competitors as written attend with the fused kernel and everybody else with plain products. In bfloat16 the two round
    differently, so each kind is held to its own, and the difference between the kinds is reported.

    Raises:
        SystemExit: they did not.
    """
    starts = {name: row["start"] for name, row in rows.items()}
    fused = {name for name in starts if "written: " in name and OURS not in name}
    kinds = [[start["ce"] for name, start in starts.items() if (name in fused) is kind] for kind in (True, False)]
    largest = max(max(ces) - min(ces) for ces in kinds)
    kl = max(abs(start["kl"]) for start in starts.values())
    counts = {(row["units"], row["answer_tokens"]) for row in rows.values()}
    if len(counts) > 1 or largest > CE_ROUNDING or kl > 0:
        sys.exit(f"the contenders do not do the same work: (tokens, answer tokens) {counts}, losses at the start {starts}")
    fused_ce, plain_ce = map(statistics.median, kinds)
    return {
        "ce at the start": plain_ce,
        "ce at the start, fused attention": fused_ce,
        "largest difference of one kind": largest,
        "largest kl at the start": kl,
    }


def line(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Least-squares line through (x, seconds), and the share of the variance that it explains."""
    x, y = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(x, y)
    return {"points": points, "seconds_per_unit": slope, "intercept": intercept, "r_squared": statistics.correlation(x, y) ** 2}


def checkpoints() -> dict[str, float]:
    """Bytes of Lightning's checkpoints after one step, optimizer included."""
    rows = compare(
        [
            Contender(MASKED, "tuning_competitors:masked_checkpoint_setup", {"layers": FROM_A_THIRD}, warm_up=0),
            Contender(OURS, "tuning:ours_checkpoint_setup", {"layers": FROM_A_THIRD}, warm_up=0),
        ],
        rounds=1,
    )
    theirs, ours = rows[MASKED]["bytes"], rows[OURS]["bytes"]
    return {f"{MASKED}, bytes": theirs, f"{OURS}, bytes": ours, f"{MASKED} / {OURS}": theirs / ours}


def compiled(count: int, rounds: int) -> dict[str, Any]:
    """What ``--model.compile`` brings once its first epoch, the warm-up, has compiled the layers."""
    options = {"layers": FROM_A_THIRD, "cached": True, "count": count}
    both = [Contender("as it is", "tuning:ours_setup", options), Contender("compiled", "tuning:ours_setup", {**options, "compiled": True})]
    rows = compare(both, rounds)
    seconds = {name: row["seconds"] for name, row in rows.items()}
    return {"seconds": seconds, "as it is / compiled": seconds["as it is"] / seconds["compiled"]}


def growth(quick: bool) -> dict[str, Any]:
    """How a cached step of ours grows."""
    options = {"layer_counts": (3, 6, 9, 12), "record_counts": (2, 4, 8) if quick else (8, 16, 32), "repeats": 1 if quick else 3}
    found = compare([Contender("growth", "tuning:growth_setup", options, warm_up=0)], rounds=1)["growth"]
    return {"with edited layers": line(found["by_layers"]), "with tokens": line(found["by_tokens"])}


def main() -> None:
    """Run the comparison and add it to the results of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="epochs that count")
    parser.add_argument("--records", type=int, default=16, help="records of an epoch")
    parser.add_argument("--quick", action="store_true", help="one epoch of 4 records, nothing written")
    parser.add_argument("--compile", action="store_true", help="measure --model.compile as well (minutes; needs a C++ compiler)")
    options = parser.parse_args()
    if not available(RECORDS):
        sys.exit("set BAD_NEURONS_DATA to the folder that holds the model-written evaluations (sycophancy_on_philpapers2020.jsonl)")
    if importlib.util.find_spec("peft") is None:
        sys.exit("peft is not installed: pip install peft")
    rounds, count = (1, 4) if options.quick else (options.rounds, options.records)
    rows: dict[str, Any] = {}
    for layers in (FROM_A_THIRD, LAST_THIRD):
        for form in ("written", "needed"):
            rows |= compare(contenders(layers, form, count), rounds)
    results = {
        "rows": rows,
        "ratios": ratios(rows),
        "agreement": check_agreement(rows),
        "checkpoint": checkpoints(),
        "growth": growth(options.quick),
        **({"compiled": compiled(count, rounds)} if options.compile else {}),
    }
    sys.stdout.write(json.dumps({name: found for name, found in results.items() if name != "rows"}, indent=1) + "\n")
    if not options.quick:
        sys.stdout.write(f"{write_results('tuning', results)}\n")


if __name__ == "__main__":
    main()
