"""Greedy layer selection: Gram matrices against a refit of scikit-learn's LogisticRegression for each candidate set.

Run it with ``python benchmarks/layer_selection.py``. 18 layers, 2,048 features a layer, 600 training and 200 validation
answers, at most 6 layers, so 93 probes. The features are synthetic (:func:`synthetic`, seeded). Ours does the whole selection,
Gram matrices included. scikit-learn does what people write, on the same path: features of the set side by side, divided by
their root mean square, ``LogisticRegression(C=1 / (l2 * N), max_iter=10_000)`` with its default solver and tolerance, in the
features' own float32 and in float64. Its BLAS has the threads that it takes by default, and again one thread, which is many
times faster where waiting for another thread is slow, as on a virtual machine. It refits ``REFITS`` candidates of each size of
set, and its seconds are scaled to all candidates of that size; the results say so.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor

LAYERS, WIDTH, TRAIN, VALIDATION, BUDGET, L2 = 18, 2048, 600, 200, 6, 0.1
REFITS = 3
OURS = "Gram matrices"
THEIRS: dict[str, dict[str, Any]] = {
    "scikit-learn, float32": {"dtype": "float32", "threads": None},
    "scikit-learn, float64": {"dtype": "float64", "threads": None},
    "scikit-learn, float32, one BLAS thread": {"dtype": "float32", "threads": 1},
    "scikit-learn, float64, one BLAS thread": {"dtype": "float64", "threads": 1},
}


class Data(NamedTuple):
    """Features of all layers, and labels.

    Attributes:
        train: [TRAIN, WIDTH] by layer, float32.
        validation: [VALIDATION, WIDTH] by layer.
        y_train: labels [TRAIN].
        y_validation: labels [VALIDATION].
    """

    train: dict[int, Tensor]
    validation: dict[int, Tensor]
    y_train: Tensor
    y_validation: Tensor


def synthetic(seed: int = 0) -> Data:
    """Sparse features that look like max-pooled SAE features of short answers.

    About 16 % of the values are above zero; most features are rare and a few are always on; all layers see the same topics;
    later layers are louder. In a third of the layers 60 features also rise with the label, in some more and in some less,
    under noise that the features of one layer share, so that a second layer helps.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n = TRAIN + VALIDATION
    y = (torch.arange(n) % 2).float()
    topics = normal(n, 48) * torch.logspace(0.3, -0.7, 48)
    informative = torch.randperm(LAYERS, generator=generator)[: LAYERS // 3].tolist()
    strength = dict(zip(informative, torch.linspace(1.6, 0.8, len(informative)).tolist(), strict=True))
    features = {}
    for layer in range(LAYERS):
        threshold = 3.2 + 2.2 * normal(WIDTH)
        before = topics @ normal(48, WIDTH) * 0.35 + 0.6 * normal(n, WIDTH) - threshold
        carriers = torch.randperm(WIDTH, generator=generator)[:60]
        before[:, carriers] += strength.get(layer, 0.0) * ((2 * y - 1)[:, None] + 0.8 * normal(n, 1))
        features[layer] = before.relu() * (0.8 * normal(WIDTH)).exp() * 10 ** (0.2 + 1.2 * layer / LAYERS)
    return Data({k: x[:TRAIN] for k, x in features.items()}, {k: x[TRAIN:] for k, x in features.items()}, y[:TRAIN], y[TRAIN:])


def ours() -> harness.Round:
    """Setup of the package's selection."""
    from bad_neurons.probe.layers import select_layers

    data = synthetic()
    harness.mark_base()

    def run() -> Mapping[str, Any]:
        selection = select_layers(*data, l2=L2, budget=BUDGET)
        scores = {_name(selection.order[:k], layer): s for k, step in enumerate(selection.steps) for layer, s in step.candidates.items()}
        return {"units": len(scores), "order": selection.order, "scores": {name: list(s) for name, s in scores.items()}}

    return run


def refits(order: Sequence[int], dtype: str, threads: int | None) -> harness.Round:
    """Setup of scikit-learn on the path ``order``."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)
    data = synthetic()
    train, validation = ({layer: x.numpy() for layer, x in side.items()} for side in data[:2])
    y_train, y_validation = data.y_train.numpy(), data.y_validation.numpy()
    harness.mark_base()

    def scores(layers: Sequence[int]) -> list[float]:
        x = np.concatenate([train[layer] for layer in layers], axis=1).astype(dtype, copy=False)
        scale = np.sqrt(np.mean(x * x))
        model = LogisticRegression(C=1 / (L2 * len(x)), max_iter=10_000).fit(x / scale, y_train)
        logits = model.decision_function(np.concatenate([validation[layer] for layer in layers], axis=1).astype(dtype, copy=False) / scale)
        probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
        found = roc_auc_score(y_validation, logits), accuracy_score(y_validation, logits > 0), log_loss(y_validation, probability)
        return [float(value) for value in found]

    def run() -> Mapping[str, Any]:
        found, seconds = {}, []
        for size in range(len(order)):
            rest = [layer for layer in sorted(train) if layer not in order[:size]]
            candidates = [order[size], *(layer for layer in rest if layer != order[size])][:REFITS]
            start = time.perf_counter()
            for layer in candidates:
                found[_name(order[:size], layer)] = scores([*order[:size], layer])
            seconds.append((time.perf_counter() - start) / len(candidates))
        return {"units": len(found), "scores": found, "seconds_a_refit": seconds}

    return run


def _name(taken: Sequence[int], layer: int) -> str:
    return " ".join(map(str, [*sorted(taken), layer]))


def main() -> None:
    """Compare, check that both find the same scores, and write the results."""
    from bad_neurons.probe.layers import select_layers

    order = select_layers(*synthetic(), l2=L2, budget=BUDGET).order
    contenders = [harness.Contender(OURS, "layer_selection:ours")]
    contenders += [harness.Contender(name, "layer_selection:refits", {"order": order, **how}, warm_up=0) for name, how in THEIRS.items()]
    results = harness.compare(contenders)
    mine = results[OURS]
    rows = {
        OURS: {"seconds": mine["seconds"], "seconds_all": mine["seconds_all"], "probes": mine["units"], "peak_bytes": mine["peak_bytes"]}
    }
    rows |= {name: _scaled(results[name], mine["scores"]) for name in THEIRS}
    ratios = {name: rows[name]["seconds"] / mine["seconds"] for name in THEIRS}
    setting = {"layers": LAYERS, "width": WIDTH, "train": TRAIN, "validation": VALIDATION, "budget": BUDGET, "l2": L2, "order": order}
    path = harness.write_results("layer_selection", {"data": "synthetic, seed 0", **setting, "rows": rows, "ratios": ratios})
    sys.stdout.write(json.dumps({"rows": rows, "ratios": ratios}, indent=1) + f"\n{path}\n")


def _scaled(result: Mapping[str, Any], mine: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Seconds for all candidates of each size, and how far the scores of the refits are from ours."""
    candidates = [LAYERS - size for size in range(BUDGET)]
    seconds = sum(n * each for n, each in zip(candidates, result["seconds_a_refit"], strict=True))
    apart = zip(*((abs(a - b) for a, b in zip(found, mine[name], strict=True)) for name, found in result["scores"].items()), strict=True)
    difference = {score: [statistics.median(d), max(d)] for score, d in zip(("auroc", "accuracy", "log_loss"), apart, strict=True)}
    return {
        "seconds": seconds,
        "scaled": f"from {result['units']} refits ({REFITS} of each size of set, {result['seconds']:.2f} s) to {sum(candidates)}",
        "seconds_a_refit_by_size": [round(each, 4) for each in result["seconds_a_refit"]],
        "score_difference_median_max": difference,
        "peak_bytes": result["peak_bytes"],
    }


if __name__ == "__main__":
    main()
