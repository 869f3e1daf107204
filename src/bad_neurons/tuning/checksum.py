"""A checksum of a tensor's raw bits that is quick enough to take of a whole model before and behind a fit.

The bits are read as int32 words, n of them, in blocks of K. A block's sum is ``sum_i a_i w_i mod 2^64`` with fixed odd numbers
``a_i`` that were drawn at random: multilinear hashing (arXiv 1202.4961). BLAKE2b over the sums of all blocks, dtype and shape
makes one digest of them, so places count inside a block and between blocks.

What it misses: nothing where the change of a block lies in one word, since an odd number times less than 2^32 is never 0 modulo
2^64; so every flipped bit, and every changed float32, is found. Any other change goes unseen for one drawing of the ``a_i`` in
``2^(63 - t)``, t the lowest place at which bits of a word of the block changed: 2^32 where nothing but sign bits of float32 did, 2^63
where a lowest bit did too. It is a guard against faults, not against somebody who knows the numbers.

Legend: n words, K words of a block.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**15  # K: products of a few blocks, 256 kB each, stay in a processor's cache
_BLOCKS_AT_ONCE = {"cpu": 8}
_BLOCKS_ELSEWHERE = 256  # 64 MB of products


def checksum(tensor: Tensor) -> str:
    """Digest of a tensor's bits, dtype and shape (hex, 128 bits); the same on every device.

    Args:
        tensor: any shape, any dtype; it is read where it lies.
    """
    sums = block_sums(_words(tensor.detach()))
    return hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + sums.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def block_sums(words: Tensor) -> Tensor:
    """``sum_i a_i w_i mod 2^64`` of each block of K words: int64 [ceil(n / K)] of int32 [n]."""
    whole = len(words) - len(words) % _BLOCK
    rows, odd = words[:whole].view(-1, _BLOCK), _odd_numbers(words.device)
    at_once = _BLOCKS_AT_ONCE.get(words.device.type, _BLOCKS_ELSEWHERE)
    sums = [(part * odd).sum(-1) for part in rows.split(at_once)] if whole else []
    if whole < len(words):
        sums.append((words[whole:] * odd[: len(words) - whole]).sum()[None])
    return torch.cat(sums) if sums else odd[:0]


def _words(tensor: Tensor) -> Tensor:
    """The bits as int32 [n], zeros behind the last byte."""
    flat = tensor.contiguous().reshape(-1)
    if flat.numel() * flat.element_size() % 4 or flat.storage_offset() * flat.element_size() % 4:
        octets = flat.view(torch.uint8)
        flat = F.pad(octets, (0, -len(octets) % 4))
    return flat.view(torch.int32)


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    """``a_i``: odd int64 [K], the same in every process."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (_BLOCK,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)
