"""Batches in an order that is the same on every process, and that a fit can take up again, also in the middle of an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Sized
from typing import TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.ranks import ALONE, Rank

Batch = TypeVar("Batch")


class EpochOrder(DistributedSampler[int]):
    """Deals the numbers of an epoch's batches to the processes, one each in turn.

    A random order depends on the seed and the epoch alone, so a resumed fit reads what an uninterrupted one reads, and batches
    ``i * world`` to ``(i + 1) * world - 1`` of it are read together: the processes' step is that of one process which accumulates
    ``world`` batches. Where numbers run out, a process gets ``len(data_source)``, which stands for no batch; nothing is read
    twice, unlike with torch's own class, whose subclass this is so that Lightning leaves it in place.

    Args:
        data_source: the batches.
        seed: seed of the order; None is that of the batches.
        rank: which of several processes this is.
    """

    def __init__(self, data_source: Sized, seed: int | None = None, rank: Rank = ALONE) -> None:
        super().__init__(data_source, rank.world, rank.number, shuffle=seed is not None)  # type: ignore[arg-type]
        self.count, self.order_seed, self.processes = len(data_source), seed, rank

    @override
    def __len__(self) -> int:
        return -(-self.count // self.processes.world)

    @override
    def __iter__(self) -> Iterator[int]:
        # Dealt with the first number, not before: on resuming, Lightning makes the iterator before it tells the epoch.
        yield from self._deal()

    def _deal(self) -> Sequence[int]:
        order = list(range(self.count))
        if self.order_seed is not None:
            generator = torch.Generator().manual_seed(self.order_seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        return self.processes.share(order + [self.count] * (-self.count % self.processes.world))


class ResumableLoader(DataLoader[Batch]):
    """Batches in an :class:`EpochOrder`, with a position: a checkpoint keeps it, and going on starts behind the last batch.

    It draws nothing from the global random numbers, whose state would otherwise depend on how often an epoch was begun. Every
    process has read as many batches as the others, so the position that one of them saves is that of all. The data module has to
    hand the state on: Lightning restores a loader's only where nothing has asked for the number of steps before.

    Args:
        batches: the batches, and behind them what stands for none where there may be several processes.
        order: their order.
    """

    def __init__(self, batches: Sequence[Batch], order: EpochOrder) -> None:
        super().__init__(batches, batch_size=None, sampler=order, generator=torch.Generator())  # type: ignore[arg-type]
        self.order = order
        self._position = self._first = (0, 0)  # epoch, batches of it that were read

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        epoch = self.order.epoch
        read = self._first[1] if self._first[0] == epoch else 0
        for batch in itertools.islice(super().__iter__(), read, None):
            read += 1
            self._position = (epoch, read)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, how many of its batches each process has read, and what that depends on."""
        epoch, read = self._position
        return {"epoch": epoch, "read": read, "batches": self.order.count, "processes": self.order.processes.world}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on there: the next iterator over that epoch begins behind its batches that were read.

        Raises:
            UserError: the checkpoint lies inside an epoch of another number of batches or processes.
        """
        inside = 0 < state_dict["read"] < -(-state_dict["batches"] // state_dict["processes"])
        for name, here in (("batches", self.order.count), ("processes", self.order.processes.world)):
            if inside and state_dict[name] != here:
                raise UserError(
                    f"--ckpt_path: it was saved in the middle of an epoch with {state_dict[name]} {name}, but here it is {here}; "
                    f"go on with {state_dict[name]}, or from a checkpoint of an epoch's end"
                )
        self._first = self._position = (state_dict["epoch"], state_dict["read"])
