"""Batches in an order that a fit can take up again, also in the middle of an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, RandomSampler
from typing_extensions import override

Batch = TypeVar("Batch")


class EpochOrder(RandomSampler):
    """A random order that depends on the seed and the epoch alone, so a resumed fit reads what an uninterrupted one reads.

    Lightning calls ``set_epoch``, and on several ranks puts a ``DistributedSampler`` in its place, as for any ``RandomSampler``.
    """

    def __init__(self, data_source: Sequence[object], seed: int) -> None:
        super().__init__(data_source, generator=torch.Generator())  # type: ignore[arg-type]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` from now on."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        # Read with the first index, not before: on resuming, Lightning makes the iterator before it tells the epoch.
        self.generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from super().__iter__()


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader with a position: Lightning keeps it in every checkpoint, and going on starts behind the last batch.

    It draws nothing from the global random numbers, whose state would otherwise depend on how often an epoch was begun. The
    sampler has an ``epoch``, as :class:`EpochOrder` and ``DistributedSampler`` do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"generator": torch.Generator(), **kwargs})
        self._position = self._first = (0, 0)  # epoch, batches of it that were read

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        epoch = self.sampler.epoch  # type: ignore[attr-defined]
        read = self._first[1] if self._first[0] == epoch else 0
        for batch in itertools.islice(super().__iter__(), read, None):
            read += 1
            self._position = (epoch, read)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its batches were read."""
        return dict(zip(("epoch", "read"), self._position, strict=True))

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on there: the next iterator over that epoch begins behind its batches that were read."""
        self._first = self._position = (state_dict["epoch"], state_dict["read"])
