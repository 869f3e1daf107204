"""Attention on a processor: plain matrix products (transformers' ``eager``) against torch's fused kernel (``sdpa``).

    python benchmarks/attention.py [--rounds 9]

The heads of Gemma 3 270M (4 queries, 1 key and value, 256 wide), bfloat16, a causal mask given as a tensor as padded rows
need it, 1,024 tokens at every row length. The figures are why :mod:`bad_neurons.models.load` takes ``eager`` where there is no
GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from harness import write_results
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HEADS, WIDTH, TOKENS, SCALE = 4, 256, 1024, 256**-0.5


def eager(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax in float32 between two matrix products, as transformers writes it."""
    mask = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, torch.finfo(q.dtype).min)
    scores = q @ k.repeat_interleave(HEADS, 1).transpose(2, 3) * SCALE + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v.repeat_interleave(HEADS, 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The fused kernel."""
    return scaled_dot_product_attention(q, k.repeat_interleave(HEADS, 1), v.repeat_interleave(HEADS, 1), attn_mask=allowed, scale=SCALE)


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Median time of a call."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times), 2)


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="times that each call is repeated")
    rounds = parser.parse_args().rounds
    rows = []
    for length in (32, 64, 128, 256, 512, 1024):
        count = TOKENS // length
        q, k, v = (torch.randn(count, heads, length, WIDTH, dtype=torch.bfloat16).requires_grad_() for heads in (HEADS, 1, 1))
        allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(count, 1, length, length)
        row: dict[str, float] = {"row_length": length, "rows": count}
        for name, attention in (("eager", eager), ("sdpa", sdpa)):

            def forward(attention: Callable[..., Tensor] = attention, given: tuple[Tensor, ...] = (q, k, v, allowed)) -> Tensor:
                return attention(*given)

            with torch.no_grad():
                row[f"{name}_forward_ms"] = milliseconds(forward, rounds)
            row[f"{name}_both_ms"] = milliseconds(lambda run=forward: run().sum().backward(), rounds)
        rows.append(row)
    write_results("attention", {"rows": rows})


if __name__ == "__main__":
    main()
