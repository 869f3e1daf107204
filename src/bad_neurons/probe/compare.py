"""Probes compared: SAE features against activations, pools, tokens, layers; in domain and on unseen topics.

Every probe is fitted to the end on Gram matrices (:mod:`bad_neurons.probe.gram`), so it is the probe of ``bad-neurons probe``
and dozens of them take seconds.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from bad_neurons.artifacts import write_json, written_aside
from bad_neurons.data.readers import load_records
from bad_neurons.data.splits import sources_of
from bad_neurons.errors import UserError
from bad_neurons.formats import PROBES
from bad_neurons.models.load import Dtype
from bad_neurons.probe.answers import answer_features
from bad_neurons.probe.choose import candidate_layers
from bad_neurons.probe.divide import Answers, answers_by_side, divide, sizes
from bad_neurons.probe.features import Features, Pool, PooledFeatures, Pooling, Tokens
from bad_neurons.probe.fits import Layers, Scores, best_probes, layer_sets

_COLUMNS = ("features", "pool", "tokens", "layers", "l2", "side", "measure", "value", "low", "high")

Row = dict[str, Any]


def compare_probes(
    model: str,
    layers: list[int] | None = None,
    sae: str | None = "runs/sae",
    folder: str = "runs/probes/features",
    out: str = "runs/probes",
    pools: list[Pool] = ["max", "mean"],  # noqa: B006 (read only; jsonargparse shows it in --help)
    tokens: list[Tokens] = ["answer", "all"],  # noqa: B006
    l2: list[float] = [1.0, 0.1, 0.01, 0.001],  # noqa: B006
    records: str = "embedded",
    in_domain: float = 0.2,
    validation: float = 0.2,
    test: float = 0.2,
    split_seed: int = 0,
    splits: int = 1,
    max_records: int = 0,
    dtype: Dtype = "auto",
    sae_gb: float = 8.0,
) -> dict[str, Any]:
    """Compare probes on SAE features and on activations, by pooling and layer, in domain and on unseen topics.

    Writes ``probes.json``, the same as a table of one number a row (``probes.csv``), and a plot. Intervals are 95 %, by drawing
    whole topics; differences are paired.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        layers: layers to compare, each alone and all side by side; null means all that the folder of SAEs has, or all of the model.
        sae: folder of an SAE stage, or ``release:id`` with ``{layer}``; null compares probes on activations alone.
        folder: where the features are kept; the model runs once for all of them.
        out: folder for ``probes.json``, ``probes.csv`` and ``probes.png``.
        pools: how the positions of an answer become one vector.
        tokens: pool over the tokens of the answer, or over all but BOS.
        l2: penalties on the squared norm of the weights, per example, above 0; of several each probe takes the one with the best
            AUROC on the validation side, which flatters that side.
        records: source of the records, or several with commas between them.
        in_domain: share of the questions of each training topic that are held out, to be measured on; 0 holds out none.
        validation: share of the topics for validation.
        test: share of the topics for the test, by which nothing is chosen.
        split_seed: seed of the division of topics.
        splits: number of divisions, by seeds from ``split_seed`` on; figures are means over them.
        max_records: at most so many records for training, drawn evenly over topics; 0 means all.
        dtype: dtype of the model.
        sae_gb: memory for SAEs, in GB (10^9 bytes); where they do not fit together they are loaded in turns.

    Raises:
        UserError: an option out of range, a layer that the model does not have, or too few records.
    """
    layers = candidate_layers(model, sae) if layers is None else sorted(layers)
    poolings = [Pooling(pool, of) for pool in pools for of in tokens]
    _check(layers, poolings, l2, in_domain, splits, sae_gb)
    sources = [load_records(source) for source in sources_of(records)]
    divisions = [divide(sources, in_domain, validation, test, split_seed + i, max_records) for i in range(splits)]
    read = {id(record): record for division in divisions for side in division.values() for record in side}
    used = [record for source in sources for record in source if id(record) in read]
    try:
        found = answer_features(model, used, layers, sae, poolings, Path(folder), dtype, sae_gb)
    except UserError as error:
        raise UserError(str(error).replace("--data.", "--")) from error  # here its options have no prefix
    answers = answers_by_side(divisions, used, found.labels, found.record)
    kinds: list[Features] = ["sae", "residual"] if sae else ["residual"]
    probes, differences = _probes(found.features, kinds, poolings, layers, found.labels, answers, l2)
    content = {
        "format": PROBES,
        "model": {"id": model, "digest": found.model_digest},
        "layers": layers,
        "sae": sae,
        "options": {
            "l2": l2, "records": records, "in_domain": in_domain, "validation": validation, "test": test,
            "split_seed": split_seed, "splits": splits, "max_records": max_records,
        },
        "sizes": [sizes(division, sides.rows, found.labels) for division, sides in zip(divisions, answers, strict=True)],
        "probes": probes,
        "differences": differences,
    }  # fmt: skip
    _write(Path(out), content)
    return content


def _check(layers: list[int], poolings: list[Pooling], l2: list[float], in_domain: float, splits: int, sae_gb: float) -> None:
    if not layers or len(set(layers)) < len(layers):
        raise UserError(f"--layers {layers}: one layer or more, each of them once")
    if not poolings or len(set(poolings)) < len(poolings):
        raise UserError("--pools, --tokens: one of each or more, each of them once")
    if not l2 or min(l2) <= 0:
        raise UserError(f"--l2 {l2}: one penalty or more, each above 0")
    if not 0 <= in_domain < 1:
        raise UserError(f"--in_domain {in_domain}: a share from 0 to below 1, such as 0.2")
    if splits < 1:
        raise UserError(f"--splits {splits}: at least 1")
    if sae_gb <= 0:
        raise UserError(f"--sae_gb {sae_gb}: above 0, such as 8")


def _probes(
    features: PooledFeatures, kinds: Sequence[Features], poolings: Sequence[Pooling], layers: Sequence[int], labels: Tensor,
    answers: Sequence[Answers], penalties: Sequence[float],
) -> tuple[list[Row], list[Row]]:  # fmt: skip
    """Rows of all probes, and of the differences SAE minus residual."""
    probes, differences = [], []
    count = len(kinds) * len(poolings) * len(answers) * len(layer_sets(layers)) * len(penalties)
    with tqdm(total=count, desc="probes", unit="probe") as bar:
        for pooling in poolings:
            fitted = {
                kind: best_probes(partial(features.read, pooling, kind), layers, labels, answers, penalties, bar.update) for kind in kinds
            }
            for kind, fits in fitted.items():
                probes += [_row(pooling, fit.layers, fit.scores, features=kind, l2=fit.l2) for fit in fits]
            for one, other in zip(fitted.get("sae", []), fitted["residual"], strict=False):
                differences.append(_row(pooling, one.layers, _minus(one.scores, other.scores)))
    return probes, differences


def _minus(one: Scores, other: Scores) -> Scores:
    return {side: {name: value.minus(other[side][name]) for name, value in scores.items()} for side, scores in one.items()}


def _row(pooling: Pooling, layers: Layers, scores: Scores, **more: Any) -> Row:
    estimates = {side: {name: value.estimate() for name, value in measures.items()} for side, measures in scores.items()}
    return {**more, "pool": pooling.pool, "tokens": pooling.tokens, "layers": list(layers), "scores": estimates}


def _write(out: Path, content: Mapping[str, Any]) -> None:
    write_json(out / "probes.json", content)
    with written_aside(out / "probes.csv") as aside, open(aside, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(_COLUMNS)
        writer.writerows(_cells(content))
    from bad_neurons.report.plots import save_png  # matplotlib takes a second to import
    from bad_neurons.report.probes import plot_probes

    save_png(plot_probes(content), out / "probes.png")


def _cells(content: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """One number a row, with its interval."""
    for row in (*content["probes"], *content["differences"]):
        layers = "all" if len(row["layers"]) > 1 else row["layers"][0]
        for side, measures in row["scores"].items():
            for name, value in measures.items():
                names = (row.get("features", "sae - residual"), row["pool"], row["tokens"], layers, row.get("l2", ""), side, name)
                yield (*names, value["mean"], *value["ci95"])
