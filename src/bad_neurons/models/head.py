"""The head at a few places at a time: logits kept as the head gives them, and read in blocks of the vocabulary.

262,144 logits in float32 are 1 MB a place, and each pass over them costs as much as it takes to bring them from memory. So
they are kept in the model's own dtype, and whatever is asked of them (normaliser, mean, KL, gradient) goes over blocks that
stay in the processor's cache.

Legend: R places, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bad_neurons.models.view import DecoderView

ROWS = 256  # places whose logits exist at one time; fewer make the matrix products slower
_BLOCK = 4096  # entries of the vocabulary in one block on a processor: 256 x 4,096 x 4 bytes = 4 MB; a GPU takes them all at once


class _Walk(NamedTuple):
    log_norm: Tensor
    mean: Tensor


class Logits:
    """Logits of R places.

    Args:
        view: gives the head and the final soft cap.
        hidden: final hidden states [R, d].
    """

    def __init__(self, view: DecoderView, hidden: Tensor) -> None:
        with torch.no_grad():
            self.raw: Tensor = view.head(hidden)
        self._view = view

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the vocabulary, and the logits there, soft cap included: [R, block], float32, the caller's own."""
        V = self.raw.shape[1]
        step = V if self.raw.is_cuda else _BLOCK
        for start in range(0, V, step):
            columns = slice(start, start + step)
            yield columns, self.capped(self.raw[:, columns])

    def capped(self, raw: Tensor) -> Tensor:
        """Raw logits of any shape as float32 with the soft cap; a copy."""
        z, cap = raw.to(torch.float32, copy=True), self._view.softcap
        return z if cap is None else z.div_(cap).tanh_().mul_(cap)

    def at(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Logits [N], float32, of vocabulary entries ``ids`` [N] at places ``rows`` [N]."""
        return self.capped(self.raw[rows, ids])

    @cached_property
    def top(self) -> Tensor:
        """Largest logit of each place, [R, 1], float32."""
        return self.capped(self.raw.amax(-1, keepdim=True))  # the cap keeps the order

    @cached_property
    def _walk(self) -> _Walk:
        norm, weighted = (torch.zeros(len(self.raw), device=self.raw.device) for _ in range(2))
        for _, z in self.blocks():
            e = (z - self.top).exp_()
            norm += e.sum(-1)
            weighted += torch.linalg.vecdot(e, z)
        return _Walk(self.top + norm.log()[:, None], (weighted / norm)[:, None])

    @property
    def log_norm(self) -> Tensor:
        """``logsumexp`` of the logits, [R, 1], float32."""
        return self._walk.log_norm

    @property
    def mean(self) -> Tensor:
        """Mean of the logits under their own softmax, [R, 1], float32; the entropy is ``log_norm - mean``."""
        return self._walk.mean

    def kl_to(self, other: Logits) -> Tensor:
        """KL(self || other) of each place in nats, [R], float32; exactly 0 where the logits are the same."""
        norm, own, cross = (torch.zeros(len(self.raw), device=self.raw.device) for _ in range(3))
        for columns, z in self.blocks():
            e = (z - self.top).exp_()
            norm += e.sum(-1)
            own += torch.linalg.vecdot(e, z)
            cross += torch.linalg.vecdot(e, other.capped(other.raw[:, columns]))
        if "_walk" not in self.__dict__:  # the same walk gives them
            self.__dict__["_walk"] = _Walk(self.top + norm.log()[:, None], (own / norm)[:, None])
        return own / norm - cross / norm + (other.log_norm - self.log_norm).squeeze(-1)

    def rows(self, rows: slice) -> Logits:
        """The same at some of the places, without a copy."""
        part = object.__new__(Logits)
        part.raw, part._view = self.raw[rows], self._view
        part.__dict__ |= {"top": self.top[rows], "_walk": _Walk(*(t[rows] for t in self._walk))}
        return part
