"""The selection stage: a way gives every neuron a score, and a rule makes a choice of the scores.

On a loaded model, as often as wanted: :func:`~bad_neurons.selection.ways.scores_of` and :func:`choose`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bad_neurons.data.records import Record
from bad_neurons.data.splits import load_split
from bad_neurons.data.text import load_paragraphs
from bad_neurons.data.tuning import draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.models.load import Dtype, LanguageModel, load_model
from bad_neurons.probe.module import Probe, read_probe
from bad_neurons.selection.neurons import Axis, NeuronSelection, read_neurons, write_neurons
from bad_neurons.selection.rules import RULES, SHARES, Counts, Rule
from bad_neurons.selection.ways import READS, Material, Objective, WayName, scores_of


def select(
    model: str,
    way: WayName = "probe",
    layers: list[int] | None = None,
    probe: str = "runs/probe/probe.safetensors",
    sae: str = "runs/sae",
    records: str = "embedded",
    validation: float = 0.2,
    test: float = 0.2,
    split_seed: int = 0,
    max_records: int = 256,
    text: str = "python-docs",
    max_texts: int = 64,
    objective: Objective = "odds",
    damping: float = 0.01,
    out: str = "runs/selection",
    axis: Axis = "residual",
    rule: Rule = "top_p",
    amount: float = 0.2,
    like: str | None = None,
    seed: int = 0,
    control: str | None = None,
    dtype: Dtype = "auto",
) -> NeuronSelection:
    """Score neurons in one way, choose some of them by one rule, and write ``neurons.json``.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        way: how neurons are scored: by a ``probe`` (the paper's way), at ``random``, by the ``gradient`` of the behaviour, by the
            ``contrast`` of activations, or by effect for side effect, with the curvature of each weight (``fisher``), of each
            row and column (``kfac``) or of each neuron's own direction (``fisher_step``), or attention ``heads`` by how much of
            the person's pull goes through them.
        layers: candidate layers; None takes the probe's.
        probe: ``probe.safetensors`` of a probe on SAE or on residual features; without the way ``probe`` only its layers are read,
            and only where none are given.
        sae: folder of an SAE stage, or ``release:id`` with ``{layer}``; only the way ``probe`` reads it, and not for a residual probe.
        records: source of the records, or several with commas between them; only training topics are read.
        validation: share of the topics for validation.
        test: share of the topics for the test.
        split_seed: seed of the division of topics.
        max_records: at most so many training records, drawn evenly over topics; 0 means all.
        text: source of the unrelated text for ``fisher``, ``kfac`` and ``fisher_step`` (``python-docs``, a file, a folder,
            ``hub:<dataset>``).
        max_texts: at most so many paragraphs of it, of which the first 64 tokens are read.
        objective: what the behaviour is for the ways that take its gradient: the opinion shift (``odds``), or what the tuning
            target ``neutral`` minimises.
        damping: share of the mean curvature that ``fisher``, ``kfac`` and ``fisher_step`` add to each.
        out: folder for ``neurons.json``, and for ``weights.png`` (way ``probe``).
        axis: what a neuron is: an index of the hidden size (``residual``, the paper's text), or of the MLP's
            intermediate size, or a query head of the attention (``heads``).
        rule: how the choice is made from the scores; ``same_counts`` takes as many of each layer as ``like`` has, ``all`` every
            neuron of the layers.
        amount: share of the summed scores (``top_p``), share of all neurons (``top_fraction``), or neurons of each layer
            (``top_k_per_layer``); not read by the other rules.
        like: ``neurons.json`` whose counts the rule ``same_counts`` copies.
        seed: seed of the way ``random``, of the records that are drawn, and of the tokens that ``fisher`` draws.
        control: a residual probe to draw beside this one in the plot.
        dtype: dtype in which the model is loaded.

    Raises:
        UserError: the probe belongs to another model, the way lacks something, or nothing is chosen.
    """
    check_amount(rule, amount)
    counts = counts_of(read_neurons(like)) if like else None
    trained = _probe(probe) if way == "probe" or layers is None else None
    lm = load_model(model, dtype)
    if trained and trained.origin["model"]["digest"] != lm.digest:
        raise UserError(
            f"probe {probe}: trained on {trained.origin['model']['id']}, another model than {model}; "
            "run `bad-neurons probe fit` with this one"
        )
    reads = READS[way]
    material = Material(
        lm=lm,
        layers=layers or sorted(trained.weights if trained else ()),
        axis=axis,
        records=_records(records, (validation, test, split_seed), max_records, seed) if "records" in reads else (),
        texts=load_paragraphs(text, "retention", seed)[:max_texts] if "texts" in reads else (),
        probe=trained,
        sae=sae,
        objective=objective,
        damping=damping,
        seed=seed,
    )
    said = about(material, way) | ({"like": like} if like else {})
    selection = choose(scores_of(material, way), rule, amount, lm, axis, counts, said)
    read = {"probe": trained.digest if trained else None, "like": read_neurons(like).digest if like else None}
    selection = replace(selection, inputs={name: digest for name, digest in read.items() if digest})
    write_neurons(Path(out) / "neurons.json", selection)
    if way == "probe" and trained:
        from bad_neurons.report.plots import plot_weights  # matplotlib takes a second to import

        plot_weights(trained, read_probe(control) if control else None, Path(out) / "weights.png")
    return selection


def choose(
    scores: Mapping[int, Tensor],
    rule: Rule,
    amount: float,
    lm: LanguageModel,
    axis: Axis,
    like: Counts | None = None,
    about: Mapping[str, Any] | None = None,
) -> NeuronSelection:
    """The selection that a rule makes of the scores [units] of candidate layers.

    Args:
        scores: scores by layer, see :func:`~bad_neurons.selection.ways.scores_of`.
        rule: name of the rule.
        amount: its number; not read by ``same_counts`` and ``all``.
        lm: the model that the scores are of.
        axis: what they are scores of.
        like: counts by layer, for ``same_counts``.
        about: what else the selection is to say of its rule, see :func:`about`.

    Raises:
        UserError: an amount out of its range, or nothing is chosen.
    """
    check_amount(rule, amount)
    chosen = RULES[rule](scores, amount, like)
    if not any(chosen.values()):
        raise UserError(f"--amount {amount}: rule {rule} chose no neuron; raise it")
    return NeuronSelection(
        axis=axis,
        layers=chosen,
        size=len(next(iter(scores.values()))),
        candidates=sorted(scores),
        model_id=lm.id,
        model_digest=lm.digest,
        rule={"name": rule, "amount": amount, **(about or {})},
        scores={layer: scores[layer][indices].tolist() for layer, indices in chosen.items()},
    )


def about(material: Material, way: WayName) -> dict[str, Any]:
    """What ``neurons.json`` says of how the scores came about."""
    said: dict[str, Any] = {"way": way, "objective": material.objective, "damping": material.damping, "seed": material.seed}
    return {**said, "probe": material.probe.origin["features"]} if way == "probe" and material.probe else said


def counts_of(selection: NeuronSelection) -> dict[int, int]:
    """Number of chosen neurons by layer."""
    return {layer: len(indices) for layer, indices in selection.layers.items()}


def check_amount(rule: Rule, amount: float) -> None:
    """Refuse an amount that the rule cannot take.

    Raises:
        UserError: not above 0, or a share above 1.
    """
    if rule in (*SHARES, "top_k_per_layer") and (not amount > 0 or (rule in SHARES and amount > 1)):
        raise UserError(f"--amount {amount}: a share above 0 and at most 1 (neurons of each layer for top_k_per_layer)")


def _probe(path: str) -> Probe:
    if not Path(path).is_file():
        raise UserError(f"probe {path}: no such file; `bad-neurons probe fit` writes it, and ways other than probe need only --layers")
    return read_probe(path)


def _records(sources: str, division: tuple[float, float, int], limit: int, seed: int) -> Sequence[Record]:
    return draw_evenly(load_split(sources, *division).train, limit, seed)
