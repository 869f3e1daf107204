"""Several processes that do one piece of work together: how they are started, what each does, and how they end.

Lightning's Trainer starts and numbers them for the stages that train. The others :func:`join` them through Fabric, which reads the
same environments: torchrun's, SLURM's (srun), or none, where it starts the processes on this machine itself.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from bad_neurons.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Part = TypeVar("Part", covariant=True)


class Divisible(Protocol[Part]):
    """A list, a range, a tensor."""

    def __getitem__(self, part: slice, /) -> Part:
        """Some of it."""


_FAILED = "bad-neurons/failed"  # key in the processes' common store: which of them failed first
_HEARD = "bad-neurons/heard"  # and how many have asked
_FIRST_WORD = 3.0  # seconds that the other processes leave to the first one to say what is wrong, and to end them


class Rank(NamedTuple):
    """One of several processes that do the same work together.

    Attributes:
        number: which one, from 0.
        world: how many there are.
        wait: returns when all of them have called it.
        device: torch device string of this one; ``auto`` is the GPU where there is one.
    """

    number: int = 0
    world: int = 1
    wait: Callable[[], Any] = lambda: None
    device: str = "auto"

    def share(self, items: Divisible[Part]) -> Part:
        """This process's part of ``items``: every ``world``-th one."""
        return items[self.number :: self.world]

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the tensors of all processes, which all call it; the tensor itself where there is one."""
        if self.world == 1:
            return tensor
        import torch

        there = tensor.to("cpu" if self.device == "auto" else self.device, copy=True)
        torch.distributed.all_reduce(there)
        return there.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, which all call it, by number."""
        if self.world == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Rank()


def rank_of(trainer: Any) -> Rank:
    """The process as a Lightning Trainer sees it; the only one where there is no Trainer or it has one process.

    Raises:
        UserError: a strategy that divides the model in a way that does not fit.
    """
    if trainer is None or (trainer.world_size == 1 and type(trainer.strategy).__name__ == "SingleDeviceStrategy"):
        return ALONE
    check_strategy(type(trainer.strategy).__name__.removesuffix("Strategy"))
    return Rank(trainer.global_rank, trainer.world_size, trainer.strategy.barrier, str(trainer.strategy.root_device))


def check_strategy(name: str) -> None:
    """Refuse strategies of Lightning that divide the model in another way than ours (:mod:`bad_neurons.tuning.sharded`).

    Raises:
        UserError: such a strategy (fsdp, deepspeed, model parallel).
    """
    if not name.lower().startswith(("auto", "ddp", "fsdp2", "sharded", "singledevice", "single_device")):
        raise UserError(
            f"--trainer.strategy {name}: every process holds the frozen model and its own part of the batches; give ddp, or for "
            "`tune` with a model that does not fit one device fsdp2"
        )


class Started(NamedTuple):
    """What the environment says of processes that somebody else has started.

    Attributes:
        number: which one this is.
        world: how many there are.
        here: how many of them are on this machine.
    """

    number: int
    world: int
    here: int


def started(environment: Mapping[str, str] | None = None) -> Started:
    """The processes that torchrun, srun or Lightning started together with this one; one where nobody has.

    A batch script's own step has SLURM's numbers of the allocation as well; only srun's steps have ``SLURM_STEP_NUM_TASKS``.
    """
    env = os.environ if environment is None else environment
    if "WORLD_SIZE" in env and ("RANK" in env or "LOCAL_RANK" in env):
        world = int(env["WORLD_SIZE"])
        return Started(int(env.get("RANK", env.get("LOCAL_RANK", "0"))), world, int(env.get("LOCAL_WORLD_SIZE", world)))
    world = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if world > 1:
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        return Started(int(env["SLURM_PROCID"]), world, world // nodes)
    return Started(0, 1, 1)


def join(devices: int) -> Rank:
    """Join the processes that were started together, or start ``devices`` of them on this machine (0: do not).

    Raises:
        UserError: fewer than none, or another number than there are.
    """
    there = started()
    if devices < 0:
        raise UserError(f"--devices {devices}: at least 0")
    if devices and there.world > 1 and devices != there.here:
        raise UserError(
            f"--devices {devices}: {there.here} processes were started on this machine; leave the option out, or give {there.here}"
        )
    if max(devices, there.world) <= 1:
        return ALONE
    import torch
    from lightning.fabric import Fabric

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # which rank is which
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(accelerator=accelerator, devices=devices or there.here, num_nodes=max(1, there.world // there.here), strategy="ddp")
    fabric.launch()
    fabric.barrier()  # one that failed while others still connect would leave them with an error of the network instead of its message
    return Rank(fabric.global_rank, fabric.world_size, fabric.barrier, str(fabric.device))


def leave() -> None:
    """Part from the processes of a stage that is done, so that a later stage in this process can start its own."""
    if _common_store() is None or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    import torch

    torch.distributed.destroy_process_group()
    for name in ("WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):  # as Lightning's launcher sets them
        os.environ.pop(name, None)


def speaks() -> bool:
    """Whether this process, which fails, is to say why: the first one to fail is, and the others end without a word.

    Processes that know each other ask their common store. Before they do, each fails by itself and mostly for the same reason,
    so the first one has a few seconds in which whoever started them ends the others.
    """
    store = _common_store()
    if store is None:
        if started().number > 0:
            time.sleep(_FIRST_WORD)
        return True
    import torch

    number = str(torch.distributed.get_rank())
    try:
        first: bool = store.compare_set(_FAILED, "", number).decode() == number
        store.add(_HEARD, 1)
    except RuntimeError:  # the store ends with the first process, which waits in `let_others_end` unless it was killed
        return True
    return first


def let_others_end() -> None:
    """Once this process has said why it fails: part from the others, whose calls then fail, and wait until they have asked for it."""
    store = _common_store()
    if store is None:
        return
    import torch

    number, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with suppress(RuntimeError):
        torch.distributed.destroy_process_group()
    end = time.monotonic() + _FIRST_WORD
    while number == 0 and time.monotonic() < end and store.add(_HEARD, 0) < world:
        time.sleep(0.05)


def lost(error: BaseException) -> bool:
    """Whether an error says no more than that another process has ended."""
    text = str(error).lower()
    return _common_store() is not None and isinstance(error, RuntimeError) and "connection" in text and ("peer" in text or "reset" in text)


def _common_store() -> Any:
    """The store of the processes that this one has joined, or None."""
    if "torch.distributed" not in sys.modules:
        return None
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.distributed_c10d._get_default_store()
