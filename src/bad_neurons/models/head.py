"""The head at a few places at a time: logits kept as the head gives them, and read in blocks of the vocabulary.

262,144 logits in float32 are 1 MB a place, and each pass over them costs as much as it takes to bring them from memory. So
they are kept in the model's own dtype, and whatever is asked of them (normaliser, mean, KL, gradient) goes over blocks that
stay in the processor's cache.

Legend: R or U places, d hidden size, V vocabulary, N tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from threading import Barrier
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from bad_neurons.models.view import DecoderView

ROWS = 256  # places whose logits exist at one time; fewer make the matrix products slower
_BLOCK = 2**19  # logits in one block on a processor, 2 MB in float32; a GPU takes all at once

Result = TypeVar("Result")


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
        self._step = self.raw.shape[1] if self.raw.is_cuda else max(1, _BLOCK // max(1, len(self.raw)))

    def each_block(self, call: Callable[[slice], Result]) -> list[Result]:
        """Call with every block of columns of the vocabulary; the results in order.

        On a processor each block is one thread's: torch's own way, all threads on one block, would meet after every small
        operation, and wait there for whatever else the machine does.
        """
        V, threads = self.raw.shape[1], 1 if self.raw.is_cuda else torch.get_num_threads()
        blocks = [slice(start, min(start + self._step, V)) for start in range(0, V, self._step)]
        return [call(block) for block in blocks] if threads == 1 else list(_workers(threads).map(call, blocks))

    def block(self, columns: slice) -> Tensor:
        """Logits of some columns, soft cap included: [R, block], float32, the caller's own."""
        return self.capped(self.raw[:, columns])

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
        top = self.top

        def sums(columns: slice) -> Tensor:
            z = self.block(columns)
            e = (z - top).exp_()
            return torch.stack([e.sum(-1), torch.linalg.vecdot(e, z)])

        norm, weighted = _total(self.each_block(sums))
        return _Walk(top + norm.log()[:, None], (weighted / norm)[:, None])

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
        top = self.top
        self._step = other._step  # the same blocks, so that equal logits have equal sums to the bit

        def sums(columns: slice) -> Tensor:
            z = self.block(columns)
            e = (z - top).exp_()
            return torch.stack([e.sum(-1), torch.linalg.vecdot(e, z), torch.linalg.vecdot(e, other.block(columns))])

        norm, own, cross = _total(self.each_block(sums))
        self.__dict__["_walk"] = _Walk(top + norm.log()[:, None], (own / norm)[:, None])  # the same walk gives them
        kl: Tensor = own / norm - cross / norm + (other.log_norm - self.log_norm).squeeze(-1)
        return kl

    def drawn(self, u: Tensor) -> Tensor:
        """One vocabulary entry a place, [R], from its softmax: the first with which the summed probability passes ``u`` [R] in [0, 1)."""
        top = self.top
        blocks = self.each_block(lambda columns: (columns, (self.block(columns) - top).exp_().sum(-1).double()))
        held = torch.stack([mass for _, mass in blocks], 1).cumsum(1)
        wanted = u.to(held) * held[:, -1]
        number = (held <= wanted[:, None]).sum(1).clamp_max(len(blocks) - 1)
        found = torch.empty_like(number)
        for block in number.unique().tolist():
            (columns, mass), rows = blocks[block], (number == block).nonzero().squeeze(1)
            inside = (self.capped(self.raw[rows, columns]) - top[rows]).exp_().double().cumsum(1)
            left = wanted[rows] - (held[rows, block] - mass[rows])
            found[rows] = columns.start + (inside <= left[:, None]).sum(1).clamp_max(inside.shape[1] - 1)
        return found

    def rows(self, rows: slice) -> Logits:
        """The same at some of the places, without a copy."""
        part = object.__new__(Logits)
        part.raw, part._view, part._step = self.raw[rows], self._view, self._step
        part.__dict__ |= {"top": self.top[rows], "_walk": _Walk(*(t[rows] for t in self._walk))}
        return part


def token_log_probs(view: DecoderView, hidden: Tensor, row: Tensor, targets: Tensor) -> Tensor:
    """Log-probability [N], float32 on the processor, of each target [N] under the head at place ``row`` [N] of ``hidden`` [U, d]."""
    found = torch.empty(len(targets))
    for start in range(0, len(hidden), ROWS):
        inside = ((row >= start) & (row < start + ROWS)).nonzero().squeeze(-1)
        logits = Logits(view, hidden[start : start + ROWS])
        here, ids = (row[inside] - start).to(hidden.device), targets[inside].to(hidden.device)
        found[inside] = (logits.at(here, ids) - logits.log_norm[here, 0]).cpu()
    return found


def _total(parts: list[Tensor]) -> Tensor:
    """Sum, one after the other: equal logits have equal sums to the bit, whatever else is summed beside them."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that compute alone each."""

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number that is set last until it has first asked

    pool, all_there = ThreadPoolExecutor(threads, "head", initializer=alone), Barrier(threads)
    list(pool.map(lambda _: all_there.wait(), range(threads)))
    torch.set_num_threads(threads)  # for threads that others start
    return pool
