"""Pooled features of answers: SAE activations and the raw activations beside them, one pass for all layers.

Features never exist per token on disk, and in memory only for the tokens of one batch: while the model runs, each layer's
output is encoded and pooled, and let go. Answers to one prompt share it in one row.

Legend: N examples, P places of a batch that are pooled, B rows, T columns, d hidden size, F SAE width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bad_neurons.artifacts import digest_json
from bad_neurons.batching import Rows, shared_batches
from bad_neurons.models.passes import visit_mlp_outputs
from bad_neurons.models.view import DecoderView
from bad_neurons.numbers import check_finite
from bad_neurons.ranks import ALONE, Rank
from bad_neurons.sae.load import SAEs
from bad_neurons.shards import fill_shards

Pool = Literal["max", "mean"]
Tokens = Literal["answer", "all"]
Features = Literal["sae", "residual"]

_BATCH_TOKENS = 2048
_SHARD_EXAMPLES = 256


def pool_max(values: Tensor) -> Tensor:
    """Largest value of each feature over the tokens of an answer, [tokens, D]: [D]."""
    return values.amax(0)


def pool_mean(values: Tensor) -> Tensor:
    """Mean of each feature over the tokens of an answer, [tokens, D]: [D]."""
    return values.mean(0)


POOLS: dict[Pool, Callable[[Tensor], Tensor]] = {"max": pool_max, "mean": pool_mean}


class Pooling(NamedTuple):
    """How the positions of an answer become one vector.

    Attributes:
        pool: what is taken of them.
        tokens: which positions: those of the answer, or all but BOS.
    """

    pool: Pool
    tokens: Tokens


class PooledFeatures(NamedTuple):
    """Features of examples in shards, read when they are asked for: many poolings of many layers need not fit into memory.

    Attributes:
        turns: paths of the shards, in order, of each turn of the SAEs.
    """

    turns: list[list[Path]]

    def read(self, pooling: Pooling, features: Features, layer: int) -> Tensor:
        """Pooled features of a layer, float32: [N, F] of an SAE, or [N, d] of the activations themselves (``residual``)."""
        name = _name(pooling, features, layer)
        for paths in self.turns:
            with safe_open(paths[0], framework="pt") as shard:
                if name not in shard.keys():  # noqa: SIM118 (it is no mapping)
                    continue
            return torch.cat([_read_tensor(path, name) for path in paths])
        raise KeyError(f"{name} was not extracted")


class Example(NamedTuple):
    """A prompt with an answer.

    Attributes:
        ids: token ids of prompt and answer.
        answer_start: index of the answer's first token.
    """

    ids: list[int]
    answer_start: int


def extract_features(
    view: DecoderView,
    examples: Sequence[Example],
    saes: SAEs,
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    folder: Path,
    key: str,
    rank: Rank = ALONE,
) -> PooledFeatures:
    """Features of all examples by SAEs, and their activations, pooled in one way or several.

    Shards of 256 examples are kept in ``folder``; those of the same ``key`` are not computed again. Where the SAEs do not fit
    into memory together, the first turn's encode while the model runs, and the shards keep the raw activations that the later
    turns read: the model still runs once.

    Args:
        view: the model.
        examples: what to read.
        saes: the SAEs; none for residual features alone.
        layers: layers to read.
        poolings: how positions become one vector, one way or several; the model runs once for all.
        folder: where the shards are kept.
        key: identifies model, SAEs and data.
        rank: which of several processes this is; each computes its share of the shards.
    """
    layers = sorted(layers)
    key = digest_json([key, layers, saes.turns, list(poolings), list(examples)])
    plans = [_plan(examples[i : i + _SHARD_EXAMPLES], poolings) for i in range(0, len(examples), _SHARD_EXAMPLES)]
    first, later = (saes.turns[0], saes.turns[1:]) if saes.turns else ([], [])
    raw = [layer for turn in later for layer in turn]
    resident = saes.load(first)

    def read(number: int) -> dict[str, Tensor]:
        return _read(view, plans[number], resident, layers, raw, poolings)

    shards = fill_shards(folder, "shard", len(plans), key, read, f"features of {len(examples)} answers", rank)
    paths = [shards]
    for place, turn in enumerate(later, start=2):
        loaded = saes.load(turn)

        def encode(number: int, loaded: Mapping[int, Any] = loaded) -> dict[str, Tensor]:
            return _encode_kept(load_file(shards[number]), plans[number], loaded, poolings, view.device)

        what = f"features, SAEs {place} of {len(saes.turns)}"
        paths.append(fill_shards(folder, f"turn-{place}", len(plans), key, encode, what, rank))
    return PooledFeatures(paths)


def _name(pooling: Pooling, features: Features, layer: int) -> str:
    return f"{pooling.pool}.{pooling.tokens}.{features}.{layer}"


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
    return tensor


class _Batch(NamedTuple):
    """Examples that are read together.

    Attributes:
        numbers: which examples of the shard, in the order of ``members``.
        rows: their rows.
        at: flat places [P] in the rows that some example pools over.
        members: by which tokens are pooled, of each example, which of the P places are its own.
    """

    numbers: list[int]
    rows: Rows
    at: Tensor
    members: dict[Tokens, list[Tensor]]


def _plan(examples: Sequence[Example], poolings: Sequence[Pooling]) -> list[_Batch]:
    """The batches of one shard."""
    batches = []
    for numbers, paths, rows in shared_batches([e.ids for e in examples], _BATCH_TOKENS):
        firsts: dict[Tokens, list[int]] = {"answer": [examples[n].answer_start for n in numbers], "all": [1] * len(numbers)}
        places = {
            tokens: [path[first:] for path, first in zip(paths, firsts[tokens], strict=True)]
            for tokens in dict.fromkeys(pooling.tokens for pooling in poolings)
        }
        batches.append(_Batch(numbers, rows, *_members(places)))
    return batches


def _members(places: Mapping[Tokens, list[list[int]]]) -> tuple[Tensor, dict[Tokens, list[Tensor]]]:
    """All places [P] that are pooled, from the lowest up, and of each example which of the P are its own."""
    every = [path for paths in places.values() for path in paths]
    at, index = torch.tensor([place for path in every for place in path]).unique(return_inverse=True)
    members = iter(index.split([len(path) for path in every]))
    return at, {tokens: [next(members) for _ in paths] for tokens, paths in places.items()}


def _read(
    view: DecoderView,
    plan: Sequence[_Batch],
    saes: Mapping[int, Any],
    layers: Sequence[int],
    raw: Sequence[int],
    poolings: Sequence[Pooling],
) -> dict[str, Tensor]:
    """Run the model over the batches of a shard: pooled activations, pooled features of ``saes``, and activations of layers ``raw``."""
    found: dict[str, list[Tensor]] = {}

    def visit(layer: int, output: Tensor) -> None:
        values = output.flatten(0, 1)[at]
        pooled = _pooled(values.float(), batch, "residual", layer, poolings)
        if layer in saes:
            pooled |= _pooled(_encode(saes[layer], values), batch, "sae", layer, poolings)
        for name, rows in pooled.items():
            found.setdefault(name, []).append(rows)
        if layer in raw:
            found.setdefault(f"raw.{layer}", []).append(values.cpu())

    for batch in plan:
        at = batch.at.to(view.device)
        visit_mlp_outputs(view, batch.rows.to(view.device), layers, visit)
    place = _places(plan)
    return {name: torch.cat(parts) if name.startswith("raw.") else torch.cat(parts)[place] for name, parts in found.items()}


def _encode_kept(
    kept: Mapping[str, Tensor], plan: Sequence[_Batch], saes: Mapping[int, Any], poolings: Sequence[Pooling], device: torch.device
) -> dict[str, Tensor]:
    """Pooled features of SAEs whose turn comes after the model has run, from the shard's raw activations."""
    found: dict[str, Tensor] = {}
    place = _places(plan)
    for layer, sae in saes.items():
        parts = kept[f"raw.{layer}"].split([len(batch.at) for batch in plan])
        pooled = [_pooled(_encode(sae, part.to(device)), batch, "sae", layer, poolings) for part, batch in zip(parts, plan, strict=True)]
        found |= {name: torch.cat([rows[name] for rows in pooled])[place] for name in pooled[0]}
    return found


def _places(plan: Sequence[_Batch]) -> Tensor:
    """Where each example of the shard stands in the order of the batches."""
    return torch.tensor([number for batch in plan for number in batch.numbers]).argsort()


def _encode(sae: Any, values: Tensor) -> Tensor:
    """Features [P, F], float32, of activations [P, d]."""
    with torch.no_grad():
        features: Tensor = sae.encode(values.to(sae.W_dec.dtype)).float()
    return features


def _pooled(values: Tensor, batch: _Batch, features: Features, layer: int, poolings: Sequence[Pooling]) -> dict[str, Tensor]:
    """One vector an example, [examples, D] on the processor, from the values [P, D] of the batch; by name, a pooling each."""
    check_finite(values, f"{'activations' if features == 'residual' else 'SAE features'} of layer {layer}")
    return {
        _name(pooling, features, layer): torch.stack(
            [POOLS[pooling.pool](values[index.to(values.device)]) for index in batch.members[pooling.tokens]]
        ).cpu()
        for pooling in poolings
    }
