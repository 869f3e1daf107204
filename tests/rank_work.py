"""What processes do that work together, and how they part."""

from __future__ import annotations

import contextlib
import io
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bad_neurons import cli, ranks, stages
from bad_neurons.errors import UserError
from bad_neurons.tuning.frozen import frozen_checksums, moved


def failing(number: int | None) -> tuple[int, str]:
    """A command that fails on process `number` (None: on all) while the others wait for it; status and standard error."""

    def command(_arguments: list[str]) -> None:
        rank = ranks.join(0)
        if number in (rank.number, None):
            raise UserError("records.jsonl: cannot be read")
        rank.wait()

    stages.evaluate_command = command
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(["evaluate"])
    return status, said.getvalue()


def joined_twice(port: int) -> list[int]:
    """Two stages of a run, one after the other, each with processes of its own; how many there were, and whether anything is left."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):  # as if Lightning had started them
        os.environ.pop(name)
    first, found = dict(os.environ), []
    for environment in (first, first | {"MASTER_PORT": str(port)}):
        os.environ |= environment
        found.append(int(ranks.join(0).total(torch.ones(()))))
        ranks.leave()
        found.append(int(torch.distributed.is_initialized()) + len({"WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & set(os.environ)))
    return found


def moved_in_a_divided_layer() -> list[list[str]]:
    """What is seen to have moved in a layer that FSDP2 divides: after it ran, and after process 1 flipped a bit of its part."""
    ranks.join(0)
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    fully_shard(layer[1], mesh=init_device_mesh("cpu", (2,)))
    nothing: Any = SimpleNamespace(trainable=list)
    before = frozen_checksums(layer, nothing)
    layer(torch.ones(1, 8))
    ran = moved(before, frozen_checksums(layer, nothing))
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            layer[1].weight.to_local().view(torch.int32)[-1, -1] ^= 1
    return [ran, moved(before, frozen_checksums(layer, nothing))]
