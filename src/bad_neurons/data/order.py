"""The order in which batches are read: the same on every process, from the seed and the epoch, and resumable inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.ranks import ALONE, Rank

Batch = TypeVar("Batch")


class EpochOrder(DistributedSampler[int]):
    """Deals the numbers of an epoch's batches to the processes, one each in turn.

    The order depends on the seed and the epoch alone, so that batches ``i * world`` to ``(i + 1) * world - 1`` of it are read
    together: the processes' step i is that of one process which accumulates ``world`` batches. Where numbers run out, a process
    gets ``count``, which stands for no batch; nothing is read twice, unlike with torch's own class, whose subclass this is so that
    Lightning leaves it in place.

    Args:
        count: number of batches.
        seed: seed of the order; None is that of the numbers.
        rank: which of several processes this is.
    """

    def __init__(self, count: int, seed: int | None = None, rank: Rank = ALONE) -> None:
        super().__init__(range(count), rank.world, rank.number, shuffle=seed is not None)  # type: ignore[arg-type]
        self._count, self._seed, self._rank = count, seed, rank
        self._given = 0  # numbers that this process has got in this epoch
        self._skip = (0, 0)  # epoch, and numbers of it that were read before a resumed fit

    @override
    def __len__(self) -> int:
        return -(-self._count // self._rank.world)

    @override
    def __iter__(self) -> Iterator[int]:
        # Read with the first number, not before: on resuming, Lightning makes the iterator before it tells the epoch.
        mine = self._deal()
        epoch, skipped = self._skip
        self._given = skipped if epoch == self.epoch else 0
        for number in mine[self._given :]:
            self._given += 1
            yield number

    def _deal(self) -> Sequence[int]:
        order = list(range(self._count))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
            order = torch.randperm(self._count, generator=generator).tolist()
        return self._rank.share(order + [self._count] * (-self._count % self._rank.world))

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands; the same on every process, so a checkpoint by one of them is enough."""
        return {"epoch": self.epoch, "given": self._given, "world": self._rank.world, "count": self._count, "seed": self._seed or 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind what was read.

        Raises:
            UserError: the checkpoint lies inside an epoch of other batches, another order or another number of processes.
        """
        mine = self.state_dict()
        for name, what in (("count", "batches"), ("seed", "as --data.seed"), ("world", "processes")):
            if state[name] != mine[name]:
                raise UserError(
                    f"--ckpt_path: saved in the middle of an epoch with {state[name]} {what}, but here it is {mine[name]}; go on with "
                    f"{state[name]}, or from a checkpoint of an epoch's end"
                )
        self._skip = (state["epoch"], state["given"])


class ResumableLoader(DataLoader[Batch]):
    """Batches that lie in memory, in an :class:`EpochOrder` whose place Lightning keeps in its checkpoints.

    Args:
        batches: the batches, and behind them what stands for none where there may be several processes.
        order: their order.
    """

    def __init__(self, batches: Sequence[Batch], order: EpochOrder) -> None:
        super().__init__(batches, batch_size=None, sampler=order)  # type: ignore[arg-type]
        self.order = order

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind what was read."""
        self.order.load_state_dict(state)
