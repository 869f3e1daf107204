"""Tuning with a frozen model that does not fit one device: its layers are divided over the processes by FSDP2.

FSDP2 (``torch.distributed.fsdp.fully_shard``) gathers a layer's weights from all processes whenever one runs it, so all have to
run the same layers at the same time. Clean passes are therefore not kept, and a process that has no batch left runs one that
counts nothing. What learns is small and stays whole on every process, with DDP's mean of the gradients; so losses, checkpoints
and files are as with ``ddp``. Embeddings, head and the last layer, which runs in pieces, stay whole as well, and each process
reads the whole model into the processor's memory before its share goes to the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.tuning.clean_cache import CleanCache
from bad_neurons.tuning.module import NeuronTuner

if TYPE_CHECKING:
    import lightning as L


class ShardedStrategy(DDPStrategy):
    """``--trainer.strategy fsdp2`` of ``bad-neurons tune``: DDP for what learns, FSDP2 for the frozen decoder layers."""

    @override
    def setup(self, trainer: L.Trainer) -> None:
        module = self.lightning_module
        if not isinstance(module, NeuronTuner):
            raise UserError(f"--trainer.strategy fsdp2: divides the frozen model of `tune`; a {type(module).__name__} has none, give ddp")
        shard_frozen(module, self.root_device)
        super().setup(trainer)


StrategyRegistry.register("fsdp2", ShardedStrategy, description="frozen layers divided over the processes")


def shard_frozen(module: NeuronTuner, device: torch.device) -> None:
    """Divide all decoder layers but the last over the processes, and tell DDP to leave everything frozen alone.

    Raises:
        UserError: the layers themselves learn, or are compiled.
    """
    layers: list[nn.Module] = [part.layer for part in module.view.layers[:-1]]
    if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        raise UserError("--trainer.strategy fsdp2: the layers themselves are to learn; give --mask.mode delta, or ddp")
    if module.compile_layers:
        raise UserError("--trainer.strategy fsdp2: works without --model.compile")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        if not isinstance(layer, FSDPModule):
            fully_shard(layer, mesh=mesh)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    module._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]
    module.clean_cache = CleanCache(0, None, module.clean_cache.origin)  # a hit on one process alone would leave the others waiting
