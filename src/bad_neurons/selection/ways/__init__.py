"""Ways to choose neurons: each gives a score to every unit of the candidate layers, one small file a way.

A rule (:mod:`bad_neurons.selection.rules`) turns scores into a choice. To add a way, write a function from
:class:`~bad_neurons.selection.ways.material.Material` to scores, and name it in :data:`WAYS`, :data:`READS` and :data:`WayName`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bad_neurons.errors import UserError
from bad_neurons.selection.ways.contrast import contrast_scores
from bad_neurons.selection.ways.fisher import fisher_scores, fisher_step_scores
from bad_neurons.selection.ways.gradient import gradient_scores
from bad_neurons.selection.ways.heads import head_scores
from bad_neurons.selection.ways.kfac import kfac_scores
from bad_neurons.selection.ways.material import Material, Objective, Way
from bad_neurons.selection.ways.probe import probe_scores
from bad_neurons.selection.ways.random import random_scores

__all__ = ["READS", "WAYS", "Material", "Objective", "Way", "WayName", "scores_of"]

Need = Literal["probe", "records", "texts"]
WayName = Literal["probe", "random", "gradient", "contrast", "fisher", "fisher_step", "kfac", "heads"]

WAYS: dict[WayName, Way] = {
    "probe": probe_scores,
    "random": random_scores,
    "gradient": gradient_scores,
    "contrast": contrast_scores,
    "fisher": fisher_scores,
    "fisher_step": fisher_step_scores,
    "kfac": kfac_scores,
    "heads": head_scores,
}

# What each way reads of the material beside the model.
READS: dict[WayName, tuple[Need, ...]] = {
    "probe": ("probe",),
    "random": (),
    "gradient": ("records",),
    "contrast": ("records",),
    "fisher": ("records", "texts"),
    "fisher_step": ("records", "texts"),
    "kfac": ("records", "texts"),
    "heads": ("records",),
}

_SOURCES: dict[Need, str] = {
    "probe": "--probe: way {way} decodes a probe; give probe.safetensors of `bad-neurons probe fit`",
    "records": "--records: way {way} reads training records; give a source, such as embedded",
    "texts": "--text: way {way} weighs side effects on unrelated text; give a source, such as python-docs",
}


def scores_of(material: Material, way: WayName) -> dict[int, Tensor]:
    """Scores [units] >= 0 of every candidate layer, float32 on the CPU, by one of :data:`WAYS`.

    Raises:
        UserError: the material lacks something that the way reads, or a score is not finite.
    """
    for need in READS[way]:
        if not getattr(material, need):
            raise UserError(_SOURCES[need].format(way=way))
    scores = WAYS[way](material)
    for layer, values in scores.items():
        if not torch.isfinite(values).all():
            raise UserError(f"way {way}: layer {layer} has scores that are not finite; load the model in float32 or bfloat16")
    return scores
