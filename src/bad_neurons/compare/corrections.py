"""From a cell's options to a correction on the model: chosen neurons, LoRA, every weight, or a steering vector.

To add a kind, write a function from workbench and cell to a :class:`Correction`, and name it in :data:`CORRECTIONS`; further
arguments are the options of a method's section with the kind's name.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

from bad_neurons.errors import UserError
from bad_neurons.probe.module import read_probe
from bad_neurons.selection.select import choose, select
from bad_neurons.selection.ways import READS, WAYS, Material, scores_of
from bad_neurons.tuning.edits import Edit, NeuronDelta
from bad_neurons.tuning.full import FullDelta
from bad_neurons.tuning.lora import LoraEdit, lora_rank
from bad_neurons.tuning.steering import Steering, steering_vectors

if TYPE_CHECKING:
    from bad_neurons.compare.setting import Cell
    from bad_neurons.compare.workbench import Workbench


class Correction(NamedTuple):
    """A correction that is on the model and has changed nothing yet.

    Attributes:
        edit: what can learn, or is given (steering).
        facts: ``parameters``, and ``neurons`` and ``share`` where neurons were chosen.
    """

    edit: Edit
    facts: dict[str, Any]


def build_correction(bench: Workbench, cell: Cell) -> Correction:
    """Put the correction of a cell on the workbench's model.

    Raises:
        UserError: an unknown kind or option.
    """
    kind = cell.options.get("correction", "neurons")
    if kind not in CORRECTIONS:
        raise UserError(f"method {cell.method}: correction {kind!r}; expected one of {', '.join(CORRECTIONS)}")
    edit, facts = CORRECTIONS[kind](bench, cell, **(cell.options.get(kind) or {}))
    parameters = sum(p.numel() for p in edit.trainable())
    return Correction(edit, {"correction": kind, "parameters": parameters, "neurons": None, "share": None, **facts})


def neurons(bench: Workbench, cell: Cell) -> Correction:
    """Neurons (or heads) chosen in one of the ways of ``selection/ways``, with the options of ``bad-neurons select``."""
    asked: dict[str, Any] = cell.options.get("select") or {}
    chosen: dict[str, Any] = {name: p.default for name, p in signature(select).parameters.items()} | asked
    if chosen["way"] not in WAYS:
        raise UserError(f"method {cell.method}: way {chosen['way']!r}; expected one of {', '.join(WAYS)}")
    reads = READS[chosen["way"]]
    probe = asked.get("probe") or bench.setting.probe
    probe = bench.setting.residual_probe if probe == "residual" else probe
    material = Material(
        lm=bench.lm,
        layers=chosen["layers"] or list(bench.setting.layers),
        axis=chosen["axis"],
        records=bench.training_records(cell.examples or chosen["max_records"], cell.seed) if "records" in reads else (),
        texts=bench.retention(cell.seed)[: chosen["max_texts"]] if "texts" in reads else (),
        probe=read_probe(probe) if "probe" in reads and probe else None,
        sae=asked.get("sae") or bench.setting.sae,
        objective=chosen["objective"],
        damping=chosen["damping"],
        seed=cell.seed,
    )
    scores = scores_of(material, chosen["way"])
    like = None
    if chosen["like"]:  # the counts of another method's choice with the same seed
        other = {**cell.options, "select": {key: value for key, value in asked.items() if key != "like"} | chosen["like"]}
        edit, _ = neurons(bench, cell._replace(options=other))
        edit.remove()
        like = {layer: len(indices) for layer, indices in edit.selection.layers.items()}  # type: ignore[attr-defined]
    selection = choose(scores, chosen["rule"], chosen["amount"], bench.lm, chosen["axis"], like)
    by_layer = {str(layer): len(indices) for layer, indices in selection.layers.items()}
    facts = {"neurons": selection.count, "share": selection.share, "by_layer": by_layer, "first_layer": selection.first_layer}
    return Correction(NeuronDelta(bench.view, selection), facts)


def lora(bench: Workbench, cell: Cell, rank: int | None = None, share: float = 0.03) -> Correction:
    """LoRA on the MLPs of the layers, with as many parameters as ``share`` of their neurons would have, or of a given ``rank``."""
    layers, view = list(bench.setting.layers), bench.view
    same = round(share * view.d_mlp * len(layers)) * 3 * view.d_model
    rank = rank or lora_rank(view, layers, same)
    return Correction(LoraEdit(view, layers, rank, seed=cell.seed), {"rank": rank})


def full(bench: Workbench, cell: Cell) -> Correction:
    """Every weight of all decoder layers."""
    return Correction(FullDelta(bench.view), {})


def steering(bench: Workbench, cell: Cell, layers: list[int] | None = None) -> Correction:
    """The mean difference of activations, added behind one layer (the middle one of the setting's), or behind ``layers``."""
    layers = layers or [bench.setting.layers[len(bench.setting.layers) // 2]]
    records = bench.training_records(cell.examples, cell.seed)
    return Correction(Steering(bench.view, steering_vectors(bench.view, bench.lm.tokenizer, records, layers)), {"layers": layers})


CORRECTIONS: dict[str, Callable[..., Correction]] = {"neurons": neurons, "lora": lora, "full": full, "steering": steering}
