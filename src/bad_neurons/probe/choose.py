"""The stage that chooses the layers of the probe: from records to ``layers.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from bad_neurons.artifacts import write_json
from bad_neurons.errors import UserError
from bad_neurons.formats import LAYERS
from bad_neurons.models.load import Dtype, layer_count
from bad_neurons.probe.data import ProbeDataModule
from bad_neurons.probe.features import Features, Pool, Tokens
from bad_neurons.probe.layers import LayerSelection, Score, Scores, check_options, select_layers


def choose_layers(
    model: str,
    candidates: list[int] | None = None,
    sae: str | None = "runs/sae",
    features: Features = "sae",
    folder: str = "runs/layers/features",
    out: str = "runs/layers",
    l2: float = 1e-3,
    score: Score = "auroc",
    budget: int | None = None,
    records: str = "embedded",
    pool: Pool = "max",
    tokens: Tokens = "answer",
    validation: float = 0.2,
    test: float = 0.2,
    split_seed: int = 0,
    max_records: int = 0,
    dtype: Dtype = "auto",
    sae_gb: float = 8.0,
) -> LayerSelection:
    """Choose the probe's layers by greedy forward selection, and write ``layers.json`` and a plot of the scores.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        candidates: layers to choose from; null means all that the folder of SAEs has, or all of the model.
        sae: folder of an SAE stage, or ``release:id`` with ``{layer}``; not read for ``residual`` features.
        features: ``sae`` features, or the ``residual`` activations themselves, which need no SAE.
        folder: where the features are kept.
        out: folder for ``layers.json`` and ``layers.png``.
        l2: the probe's penalty on the squared norm of the weights, per example; above 0.
        score: score of the validation side that decides; ``auroc`` is the share of pairs of a sycophantic and an honest
            answer that the probe puts in order, ``accuracy`` ties often, and ``log_loss`` rewards calibration too.
        budget: choose at most so many layers; null means a third of the candidates.
        records: source of the records.
        pool: how the positions of an answer become one vector.
        tokens: pool over the tokens of the answer, or over all but BOS.
        validation: share of the topics for validation, by which the layers are chosen.
        test: share of the topics for the test, which is left alone here.
        split_seed: seed of the division of topics.
        max_records: at most so many records for training, drawn evenly over topics; 0 means all.
        dtype: dtype of the model.
        sae_gb: memory for SAEs, in GB (10^9 bytes); where they do not fit together they are loaded in turns.

    Raises:
        UserError: a layer that the model does not have, or an option out of range.
    """
    source = sae if features == "sae" else None
    candidates = candidate_layers(model, source) if candidates is None else sorted(candidates)
    check_options(candidates, l2, budget)
    try:
        data = ProbeDataModule(
            model=model, layers=candidates, sae=source, features=features, folder=folder, records=records, pool=pool, tokens=tokens,
            validation=validation, test=test, split_seed=split_seed, max_records=max_records, dtype=dtype, sae_gb=sae_gb,
        )  # fmt: skip
        data.prepare_data()
        data.setup("fit")
    except UserError as error:
        # Here its options have no prefix, and its layers are the candidates.
        raise UserError(str(error).replace("--data.layers", "--candidates").replace("--data.", "--")) from error
    train, held_out = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    by_layer, by_layer_held_out = (dict(zip(candidates, side.x.split(data.widths, dim=1), strict=True)) for side in (train, held_out))
    selection = select_layers(by_layer, by_layer_held_out, train.y, held_out.y, l2, budget, score)
    options = {
        "score": score, "l2": l2, "budget": budget, "records": records, "validation": validation, "test": test,
        "split_seed": split_seed, "max_records": max_records,
    }  # fmt: skip
    examples = {"train": len(train.y), "validation": len(held_out.y)}
    _write(Path(out), selection, data.origin(), options, examples)
    return selection


def candidate_layers(model: str, sae: str | None) -> list[int]:
    """All layers that have an SAE where ``sae`` is a folder of them, else all of the model.

    Raises:
        UserError: the folder has no SAE, or the model is not found.
    """
    if not sae or not Path(sae).is_dir():
        return list(range(layer_count(model)))
    named = [path.name.removeprefix("layer-") for path in Path(sae).glob("layer-*")]
    found = sorted(int(number) for number in named if number.isdecimal())
    if not found:
        raise UserError(f"--sae {sae}: no layer-<number> in this folder; `bad-neurons sae fit` makes them")
    return found


def _write(out: Path, selection: LayerSelection, origin: dict[str, Any], options: dict[str, Any], examples: dict[str, int]) -> None:
    content = {
        "format": LAYERS,
        **{key: value for key, value in origin.items() if key != "layers"},
        "candidates": origin["layers"],
        "options": options,
        "examples": examples,
        "order": selection.order,
        "chosen": selection.chosen,
        "curve": [{"layer": step.layer, "taken": step.taken, **step.scores._asdict()} for step in selection.steps],
        "without_layers": selection.without._asdict(),
        "all_candidates": selection.everything._asdict(),
        "scores": [{layer: scores._asdict() for layer, scores in step.candidates.items()} for step in selection.steps],
    }
    write_json(out / "layers.json", content)
    from bad_neurons.report.plots import plot_layer_choice, save_png  # matplotlib takes a second to import

    save_png(plot_layer_choice(content), out / "layers.png")


def layers_table(selection: LayerSelection) -> Table:
    """Validation scores with each layer more, a layer that was not taken in brackets."""
    chosen = ", ".join(map(str, selection.chosen)) or "none; no layer is better than none"
    table = Table(caption=f"Scores on the validation side. Chosen: {chosen}")
    for name in ("Layers", "Added", "AUROC", "Accuracy", "Log loss (nats)"):
        table.add_column(name, justify="right")
    table.add_row("0", "", *_texts(selection.without))
    for number, step in enumerate(selection.steps, 1):
        table.add_row(str(number), str(step.layer) if step.taken else f"({step.layer})", *_texts(step.scores))
    table.add_section()
    count = len(selection.steps[0].candidates)
    table.add_row(str(count), "all", *_texts(selection.everything))
    return table


def _texts(scores: Scores) -> tuple[str, str, str]:
    return f"{scores.auroc:.4f}", f"{100 * scores.accuracy:.1f} %", f"{scores.log_loss:.4f}"
