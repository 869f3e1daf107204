"""Answers with their labels, and what an extraction says of them.

Label 1 is a sycophantic answer. An honest answer has label 0, also where it agrees with a person who is right: the probe
is to find sycophancy, not agreement.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bad_neurons.data.records import Record
from bad_neurons.models.load import Dtype, load_model
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import view_decoder
from bad_neurons.probe.features import Example, PooledFeatures, Pooling, extract_features
from bad_neurons.ranks import ALONE, Rank
from bad_neurons.sae.load import SAEs, sae_digests


class AnswerFeatures(NamedTuple):
    """Features of the answers of records.

    Attributes:
        features: the features, N rows.
        labels: labels [N], float32; 1 is sycophantic.
        record: which of the records each answer belongs to, [N], int64.
        model_digest: fingerprint of the model.
        sae_digests: digest of the folder of each layer's SAE, by layer as text; empty for published SAEs and for none.
    """

    features: PooledFeatures
    labels: Tensor
    record: Tensor
    model_digest: str
    sae_digests: dict[str, str]


def answer_features(
    model: str,
    records: Sequence[Record],
    layers: list[int],
    sae: str | None,
    poolings: Sequence[Pooling],
    folder: Path,
    dtype: Dtype = "auto",
    sae_gb: float = 8.0,
    rank: Rank = ALONE,
) -> AnswerFeatures:
    """Read the answers of records with a model, in one pass for all layers and poolings.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        records: whose answers are read.
        layers: layers to read.
        sae: folder of an SAE stage, or ``release:id`` with ``{layer}``; None for the activations alone.
        poolings: how the positions of an answer become one vector.
        folder: where the features are kept.
        dtype: dtype of the model.
        sae_gb: memory for SAEs, in GB (10^9 bytes).
        rank: which of several processes this is.

    Raises:
        UserError: a layer that the model does not have, or an SAE that does not fit.
    """
    lm = load_model(model, dtype, rank.device)
    view = view_decoder(lm.model)
    view.check_layers(layers, "--data.layers")
    examples, labels, record = _examples(lm.tokenizer, records)
    saes = SAEs(sae, layers, view.d_model, str(view.device), sae_gb * 1e9)
    digests = sae_digests(sae, layers)
    key = f"{lm.digest} {lm.model.dtype} {list(digests.values()) or sae}"
    features = extract_features(view, examples, saes, layers, poolings, folder, key, rank)
    return AnswerFeatures(features, labels, record, lm.digest, digests)


def _examples(tokenizer: Any, records: Sequence[Record]) -> tuple[list[Example], Tensor, Tensor]:
    examples, labels, numbers = [], [], []
    for number, record in enumerate(records):
        for answer, label in ((record.honest, 0.0), (record.sycophantic, 1.0)):
            if answer is not None:
                ids = tokenize(tokenizer, record.prompt, answer)
                examples.append(Example(ids.prompt + ids.answer, len(ids.prompt)))
                labels.append(label)
                numbers.append(number)
    return examples, torch.tensor(labels), torch.tensor(numbers)
