"""Features like those of an SAE, and logistic regression fitted to features themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse(n: int, width: int, seed: int, loudness: float = 1.0) -> Tensor:
    """Features with many zeros, a large mean and a few loud columns."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(n, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    return loudness * (topics + torch.randn(n, width, generator=generator) + 0.5).relu() * torch.logspace(0, 0.7, width)


def reference(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Weights of the scaled features and bias by L-BFGS in float64 on the features themselves."""
    scaled = x / x.square().mean().sqrt()
    w, bias = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w, bias], max_iter=5000, history_size=50, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(scaled @ w + bias, y) + 0.5 * l2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), bias.detach()
