"""The checksum: every bit counts, wherever it stands."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.tuning.checksum import _BLOCK, _odd_numbers, block_sums, checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def of_bytes(octets, dtype, shape):
    return torch.tensor(list(octets), dtype=torch.uint8).view(dtype).reshape(shape)


def some(dtype, count, seed=0):
    """``count`` values of any bits (of a bool 0 and 1)."""
    octets = torch.randint(0, 256, (count, dtype.itemsize), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return (octets % 2 if dtype is torch.bool else octets).flatten().view(dtype)


def flipped(tensor, place, bit):
    """The same with one bit of the value at a place the other way round."""
    octets = tensor.clone().view(torch.uint8)
    octets[place * tensor.element_size() + bit // 8] ^= 1 << bit % 8
    return octets.view(tensor.dtype)


def by_hand(words):
    """The sums of blocks in Python's own integers."""
    odd = _odd_numbers(torch.device("cpu")).tolist()
    blocks = [words[i : i + _BLOCK].tolist() for i in range(0, len(words), _BLOCK)]
    sums = [sum(a * w for a, w in zip(odd, block, strict=False)) % 2**64 for block in blocks]
    return [total - 2**64 if total >= 2**63 else total for total in sums]


@pytest.mark.parametrize("count", [0, 1, 5, _BLOCK - 1, _BLOCK, _BLOCK + 1, 9 * _BLOCK + 3])
def test_sums_are_those_of_pythons_integers(count):
    words = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)
    assert block_sums(words).tolist() == by_hand(words)


def test_the_numbers_are_odd_and_differ():
    odd = _odd_numbers(torch.device("cpu"))
    assert (odd % 2 != 0).all()
    assert len(odd.unique()) == _BLOCK
    assert (odd < 0).double().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_every_single_bit_counts(dtype, count):
    values = some(dtype, count)
    seen = {checksum(values)}
    bits = [0] if dtype is torch.bool else range(8 * dtype.itemsize)
    for place in range(count):
        seen |= {checksum(flipped(values, place, bit)) for bit in bits}
    assert len(seen) == 1 + count * len(bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_bit_anywhere_in_a_tensor_of_many_blocks_counts(dtype):
    values = some(dtype, 3 * _BLOCK * 4 // dtype.itemsize + 3)
    assert checksum(values) == checksum(values.clone())
    places = torch.randint(0, len(values), (40,)).tolist()
    for place in (0, len(values) - 1, len(values) - 2, *places):
        for bit in (0, 8 * dtype.itemsize - 1):
            assert checksum(flipped(values, place, bit)) != checksum(values)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, _BLOCK), (5, 2 * _BLOCK + 1)])
def test_places_count(one, other):
    values = some(torch.int32, 3 * _BLOCK)
    swapped = values.clone()
    swapped[one], swapped[other] = values[other], values[one]
    assert values.sum() == swapped.sum()  # what a sum cannot tell
    assert checksum(swapped) != checksum(values)


def test_signs_and_payloads_count():
    zeros = torch.zeros(6)
    assert torch.equal(zeros, -zeros)
    assert checksum(zeros) != checksum(-zeros)
    assert checksum(-zeros) != checksum(torch.cat([-zeros[:4], zeros[:2]]))  # an even number of sign bits, and no other
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert flipped(quiet, 0, 3).isnan().all()
    assert checksum(flipped(quiet, 0, 3)) != checksum(quiet)


def test_sign_bits_in_pairs_count():
    """A sum with weights of any kind over 64-bit words misses these: 2^63 times anything even is 0."""
    values = torch.randn(64)
    seen = {checksum(values)}
    for i in range(64):
        for j in range(i):
            changed = values.clone()
            changed[[i, j]] *= -1
            seen.add(checksum(changed))
    assert len(seen) == 1 + 64 * 63 // 2


def test_dtype_and_shape_count():
    values = some(torch.int32, 6)
    same_bits = [values, values.view(torch.float32), values.view(2, 3), values.view(3, 2), values.view(torch.int16)]
    assert len({checksum(v) for v in same_bits}) == len(same_bits)
    assert len({checksum(torch.zeros(n, dtype=torch.uint8)) for n in range(9)}) == 9  # padding is no content


def test_how_it_lies_in_memory_does_not_count():
    values = some(torch.bfloat16, 30).view(5, 6)
    assert checksum(values.T.contiguous().T) == checksum(values)
    assert checksum(torch.cat([values[:1, 0], values.flatten()])[1:].view(5, 6)) == checksum(values)  # begins in the middle of a word
    assert checksum(torch.tensor(1.5)) != checksum(torch.tensor([1.5]))
