"""The selection stage: probe weights decoded into neuron scores, and a rule applied to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bad_neurons.errors import UserError
from bad_neurons.models.load import Dtype, load_model
from bad_neurons.models.view import DecoderView, view_decoder
from bad_neurons.probe.module import Probe, read_probe
from bad_neurons.sae.load import decoder_directions, load_saes
from bad_neurons.selection.decode import decoded_direction, intermediate_scores, residual_scores
from bad_neurons.selection.neurons import Axis, NeuronSelection, write_neurons
from bad_neurons.selection.rules import RULES, Rule


def select(
    model: str,
    probe: str = "runs/probe/probe.safetensors",
    sae: str = "runs/sae",
    out: str = "runs/selection",
    axis: Axis = "residual",
    rule: Rule = "top_p",
    amount: float = 0.2,
    seed: int = 0,
    control: str | None = None,
    dtype: Dtype = "auto",
) -> NeuronSelection:
    """Decode a probe into neurons, choose some of them, and write ``neurons.json`` and a plot of the weights.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        probe: ``probe.safetensors`` of a probe on SAE or on residual features.
        sae: folder of an SAE stage, or ``release:id`` with ``{layer}``; not read for a residual probe.
        out: folder for ``neurons.json`` and ``weights.png``.
        axis: what a neuron is: an index of the hidden size (``residual``, the paper's text), or of the MLP's
            intermediate size.
        rule: how the choice is made from the scores.
        amount: share of the summed scores (``top_p``), share of all neurons (``top_fraction``, ``random``), or neurons
            of each layer (``top_k_per_layer``).
        seed: seed of the rule ``random``.
        control: a residual probe to draw beside this one in the plot.
        dtype: dtype in which the model is loaded.

    Raises:
        UserError: the probe belongs to another model, or nothing is chosen.
    """
    if amount <= 0 or (rule != "top_k_per_layer" and amount > 1):
        raise UserError(f"--amount {amount}: a share above 0 and at most 1 (neurons of each layer for top_k_per_layer)")
    trained = read_probe(probe)
    lm = load_model(model, dtype)
    if trained.origin["model"]["digest"] != lm.digest:
        raise UserError(
            f"probe {probe}: trained on {trained.origin['model']['id']}, another model than {model}; "
            "run `bad-neurons probe fit` with this one"
        )
    view = view_decoder(lm.model)
    scores = neuron_scores(view, probe_directions(view, trained, sae), axis)
    chosen = RULES[rule](scores, amount, seed)
    if not any(chosen.values()):
        raise UserError(f"--amount {amount}: rule {rule} chose no neuron; raise it")
    selection = NeuronSelection(
        axis=axis,
        layers=chosen,
        size=len(next(iter(scores.values()))),
        candidates=sorted(scores),
        model_id=model,
        model_digest=lm.digest,
        rule={"name": rule, "amount": amount, "seed": seed, "probe": trained.origin["features"]},
        scores={layer: scores[layer][indices].tolist() for layer, indices in chosen.items()},
    )
    write_neurons(Path(out) / "neurons.json", selection)
    from bad_neurons.report.plots import plot_weights  # matplotlib takes a second to import

    plot_weights(trained, read_probe(control) if control else None, Path(out) / "weights.png")
    return selection


def probe_directions(view: DecoderView, probe: Probe, sae: str) -> dict[int, Tensor]:
    """Direction v [d] of each layer along which the probe's log-odds rise."""
    weights = {layer: w.float() for layer, w in probe.weights.items()}
    if probe.origin["features"] == "residual":
        return weights
    saes = load_saes(sae, weights, view.d_model)
    for layer, w in weights.items():
        if saes[layer].cfg.d_sae != len(w):
            raise UserError(
                f"SAE {sae}: layer {layer} has {saes[layer].cfg.d_sae} features, but the probe has {len(w)} weights; "
                "give the SAE that the probe was trained on"
            )
    return {layer: decoded_direction(decoder_directions(saes[layer]), w) for layer, w in weights.items()}


def neuron_scores(view: DecoderView, directions: Mapping[int, Tensor], axis: Axis) -> dict[int, Tensor]:
    """Score of each neuron by layer: [d] on axis ``residual``, [m] on axis ``intermediate``.

    Raises:
        UserError: another axis.
    """
    if axis == "heads":
        raise UserError("--axis heads: a probe of MLP outputs says nothing about attention heads; expected residual or intermediate")
    if axis == "residual":
        return {layer: residual_scores(v) for layer, v in directions.items()}
    return {
        layer: intermediate_scores(v, view.layers[layer].gain().cpu(), view.layers[layer].matrix("down_proj").weight.float().cpu())
        for layer, v in directions.items()
    }
