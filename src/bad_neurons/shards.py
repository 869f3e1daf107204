"""Tensors computed piece by piece and kept in shards: an interruption costs one piece, and several processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from bad_neurons.artifacts import is_whole, write_tensors
from bad_neurons.formats import SHARD
from bad_neurons.ranks import ALONE, Rank

if TYPE_CHECKING:
    from torch import Tensor


def fill_shards(
    folder: Path,
    name: str,
    count: int,
    key: str,
    compute: Callable[[int], Mapping[str, Tensor]],
    what: str,
    rank: Rank = ALONE,
) -> list[Path]:
    """Compute the shards that are missing, damaged, or were made under another key.

    Each rank computes every ``world``-th shard; all return when all are there.

    Args:
        folder: where the shards are kept, as ``<name>-<number>.safetensors``.
        name: first part of their names; other shards may lie beside them.
        count: how many there are.
        key: identifies all that their content depends on.
        compute: the tensors of a shard, by its number.
        what: text of the progress bar.
        rank: which of several processes this is.

    Returns:
        Their paths, in order.
    """
    paths = [folder / f"{name}-{number:05d}.safetensors" for number in range(count)]
    for number in tqdm(rank.share(range(count)), desc=what, unit="shard", disable=rank.number > 0):
        if not is_whole(paths[number], SHARD, key):
            write_tensors(paths[number], compute(number), {"format": SHARD, "key": key})
    if rank.number == 0:
        for stale in set(folder.glob(f"{name}-*.safetensors")) - set(paths):
            stale.unlink()
    rank.wait()
    return paths
