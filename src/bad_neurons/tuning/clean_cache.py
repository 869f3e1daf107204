"""What the clean model says of a batch never changes, so it is computed once and kept for later epochs and later runs.

Legend: n tokens of the batch without padding, N supervised places, A taught places, d hidden size.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bad_neurons.artifacts import read_tensors, write_tensors
from bad_neurons.errors import UserError
from bad_neurons.formats import CLEAN_PASS
from bad_neurons.writing import sweep

log = logging.getLogger(__name__)


class CleanPass(NamedTuple):
    """What a tuning step needs of the clean model.

    Attributes:
        hidden: input [n, d] of the first edited layer.
        final: hidden states [N, d] behind the final norm at the supervised places.
        teacher: the same [A, d] of the teacher's rows at the taught places, or None where there are none.
        odds: log-odds [R] of the agreeing position that the teacher gives each record, float32, or None.
    """

    hidden: Tensor
    final: Tensor
    teacher: Tensor | None = None
    odds: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensors, in bytes."""
        return sum(t.numel() * t.element_size() for t in self if t is not None)


class CleanCache:
    """Clean passes by batch, in memory up to a budget, and in a folder where one is given.

    The folder keeps every batch, so another run on the same model, layers and data starts with a full cache. Several origins
    lie side by side in it, each in a subfolder of its own, until somebody deletes them. A batch is found by a digest of its
    content, so changed data is a miss and never a wrong answer. Fits one after the other may share one cache.

    Args:
        budget: bytes of memory at most.
        folder: where to keep the passes on disk; None keeps only what fits in memory.
        origin: digest of model, dtype and first edited layer.
    """

    def __init__(self, budget: int, folder: Path | None, origin: str) -> None:
        self.budget, self.folder, self.origin = budget, folder, origin
        self.hits = self.misses = 0
        self._kept: dict[str, CleanPass] = {}
        self._used = 0
        if folder and folder.is_dir():
            sweep(folder)

    def get(self, key: str) -> CleanPass | None:
        """The pass of the batch with digest ``key``, or None."""
        found = self._kept.get(key) or self._read(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, key: str, clean: CleanPass) -> None:
        """Keep a pass, where there is room."""
        clean = CleanPass(*(None if t is None else t.cpu() for t in clean))  # type: ignore[arg-type]
        self._keep(key, clean)
        if self.folder:
            tensors = {name: t for name, t in clean._asdict().items() if t is not None}
            write_tensors(self._path(key), tensors, {"format": CLEAN_PASS, "key": key, "origin": self.origin})

    def _keep(self, key: str, clean: CleanPass) -> None:
        if self._used + clean.bytes <= self.budget:
            self._kept[key] = clean
            self._used += clean.bytes

    def _read(self, key: str) -> CleanPass | None:
        if not self.folder or not self._path(key).is_file():
            return None
        try:
            tensors, metadata = read_tensors(self._path(key), CLEAN_PASS)
        except UserError as error:
            log.warning("%s; it is computed again", error)
            return None
        if (metadata.get("key"), metadata.get("origin")) != (key, self.origin):
            log.warning("%s: a clean pass of another batch or model; it is computed again", self._path(key))
            return None
        self._keep(key, clean := CleanPass(**tensors))
        return clean

    def _path(self, key: str) -> Path:
        assert self.folder
        return self.folder / self.origin[:32] / f"{key[:32]}.safetensors"
