"""Checkpoints that appear whole or not at all."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from typing_extensions import override

from bad_neurons.writing import PathLike, written_aside


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, synced, and renames it.

    Lightning 2.6 writes it to the system's folder for temporary files and moves it from there, which is a copy where that is
    another file system: a process killed in it leaves half a checkpoint in place of the last good one.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_aside(path) as aside, open(aside, "wb") as handle:
            torch.save(checkpoint, handle)
