"""Lightning's checkpoints: sealed when they are saved, and read as data alone, never as code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.formats import CHECKPOINT

if TYPE_CHECKING:
    import lightning as L

_SEAL = "bad_neurons_seal"


class SealedCheckpoints(TorchCheckpointIO):
    """Saves a checkpoint with its format and a digest of all that it holds, and refuses one whose digest is another."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        seal = {"format": str(CHECKPOINT), "digest": digest_state(checkpoint)}
        super().save_checkpoint({**checkpoint, _SEAL: seal}, path, storage_options)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None) -> Any:
        """The checkpoint; ``weights_only`` is true whatever is asked for.

        Raises:
            UserError: it cannot be read, holds more than data, has no seal, or changed since it was saved.
        """
        try:
            content = super().load_checkpoint(path, map_location, weights_only=True)
        except Exception as error:  # torch.load lets through whatever pickle and its reader of archives raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); give another, or start without --ckpt_path") from error
        seal = content.pop(_SEAL, None) if isinstance(content, dict) else None
        found = seal.get("format") if isinstance(seal, dict) else None
        if found != CHECKPOINT:
            raise UserError(f"{path}: format {found!r}; expected {str(CHECKPOINT)!r}, as `{CHECKPOINT.made_by}` saves it; start over")
        if seal.get("digest") != digest_state(content):
            raise UserError(f"{path}: damaged or changed since it was saved (its digest does not match); give another, or start over")
        return content


def seal_checkpoints(trainer: L.Trainer) -> None:
    """Let a Trainer whose checkpoints are Lightning's ordinary ones save and load sealed ones."""
    with suppress(MisconfigurationException):  # a strategy that writes its own
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SealedCheckpoints()


def digest_state(state: Any) -> str:
    """SHA-256 (hex) of nested mappings, lists, tensors and plain values."""
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(b"{")
        for key, inner in value.items():
            digest.update(repr(key).encode())
            _feed(digest, inner)
    elif isinstance(value, list | tuple):
        digest.update(b"[")
        for inner in value:
            _feed(digest, inner)
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    else:
        digest.update(repr(value).encode())
    digest.update(b"]")
