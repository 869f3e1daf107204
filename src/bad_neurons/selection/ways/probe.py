"""By a probe: how much a unit writes along the direction in which the probe's log-odds of sycophancy rise (DESIGN step 5).

Through the SAE's decoder for a probe on SAE features (arXiv 2601.18939, the paper's way), directly for a residual probe.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bad_neurons.errors import UserError
from bad_neurons.models.view import DecoderView
from bad_neurons.probe.module import Probe
from bad_neurons.sae.load import decoder_directions, load_saes, sae_digests
from bad_neurons.selection.decode import decoded_direction, intermediate_scores, residual_scores
from bad_neurons.selection.neurons import Axis
from bad_neurons.selection.ways.material import Material


def probe_scores(material: Material) -> dict[int, Tensor]:
    """Scores by the material's probe, of those of its layers that are candidates."""
    probe = material.probe
    assert probe
    if foreign := sorted(set(material.layers) - set(probe.weights)):
        raise UserError(f"--layers {foreign}: the probe has {sorted(probe.weights)}; the way probe can choose among those alone")
    weights = {layer: probe.weights[layer].float() for layer in material.layers}
    return neuron_scores(material.view, probe_directions(material.view, probe, weights, material.sae), material.axis)


def probe_directions(view: DecoderView, probe: Probe, weights: Mapping[int, Tensor], sae: str | None) -> dict[int, Tensor]:
    """Direction v [d] of each layer along which the probe's log-odds rise, from its weights [F] or [d] there."""
    if probe.origin["features"] == "residual":
        return dict(weights)
    if sae is None:
        raise UserError("--sae: the probe was trained on SAE features, and the way probe decodes them; give the folder or release:id")
    saes = load_saes(sae, weights, view.d_model)
    for layer, w in weights.items():
        if saes[layer].cfg.d_sae != len(w):
            raise UserError(
                f"SAE {sae}: layer {layer} has {saes[layer].cfg.d_sae} features, but the probe has {len(w)} weights; "
                "give the SAE that the probe was trained on"
            )
    known, here = probe.origin.get("sae_digests", {}), sae_digests(sae, weights)
    if other := [layer for layer, digest in here.items() if known.get(layer, digest) != digest]:
        raise UserError(
            f"SAE {sae}: that of layer {', '.join(other)} is another one than the probe was trained on ({probe.origin['sae']}); "
            "give that one, or run `bad-neurons probe fit` with this one"
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
