"""Tensors computed piece by piece and kept in shards: an interruption costs one piece, and several processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from bad_neurons.artifacts import is_whole, write_tensors
from bad_neurons.formats import SHARD

if TYPE_CHECKING:
    from torch import Tensor


class Rank(NamedTuple):
    """One of several processes that do the same work together.

    Attributes:
        number: which one, from 0.
        world: how many there are.
        wait: returns when all of them have called it.
    """

    number: int = 0
    world: int = 1
    wait: Callable[[], Any] = lambda: None


ALONE = Rank()


def rank_of(trainer: Any) -> Rank:
    """The process as a Lightning Trainer sees it; the only one where there is no Trainer."""
    return Rank(trainer.global_rank, trainer.world_size, trainer.strategy.barrier) if trainer else ALONE


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
    for number in tqdm(range(rank.number, count, rank.world), desc=what, unit="shard", disable=rank.number > 0):
        if not is_whole(paths[number], SHARD, key):
            write_tensors(paths[number], compute(number), {"format": SHARD, "key": key})
    rank.wait()
    if rank.number == 0:
        for stale in set(folder.glob(f"{name}-*.safetensors")) - set(paths):
            stale.unlink()
    return paths
