"""The probe as a small dense problem: Gram matrices of layers, and logistic regression on them.

With an L2 penalty the best weights are a combination of the training examples, ``w = X^T alpha``, so a probe on any layers
needs no more of the features than the inner products of the examples; and the inner products of features side by side are
the sum of those of the parts. One pass over the features of each layer is enough for the probes of all sets of layers.

Legend: N training examples, M validation examples, D features of a layer (or of several side by side).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bad_neurons.errors import UserError

_TOLERANCE = 1e-8  # of a probability
_BLOCKS = 4


class Gram(NamedTuple):
    """Inner products of the examples, the mean of the training side taken off, in float64.

    Taking the mean off changes nothing but the bias, which has no penalty, and the sums stay accurate: most of the energy
    of pooled features is their mean.

    Attributes:
        train: training with training examples, [N, N].
        validation: validation with training examples, [M, N].
        squares: sum of the squares of the N x D training features as they were, mean included.
        width: D.
    """

    train: Tensor
    validation: Tensor
    squares: float
    width: int

    def mean_square(self, *others: Gram) -> float:
        """Mean square of the training features of this and other layers side by side: the square of the probe's scale."""
        grams = (self, *others)
        # The bound is the one of LinearProbe's scale, for layers of nothing but zeros.
        return max(sum(g.squares for g in grams) / (len(self.train) * sum(g.width for g in grams)), 1e-16)

    def beside(self, other: Gram) -> Gram:
        """The Gram matrices of the features of both, side by side."""
        return Gram(
            self.train + other.train, self.validation + other.validation, self.squares + other.squares, self.width + other.width
        )


def gram(train: Tensor, validation: Tensor) -> Gram:
    """Gram matrices of features [N, D] and [M, D] of any dtype.

    The products run in float64: rounding in float32 would move the fit where the penalty is small, and costs little less.
    """
    x = train.double()
    centred = torch.cat([x, validation.double()]) - x.mean(0)
    n = len(x)
    product = x.new_empty(len(centred), n)
    size = -(-n // _BLOCKS)
    for start in range(0, n, size):  # only the blocks on and below the diagonal
        stop = min(start + size, n)
        torch.mm(centred[start:], centred[start:stop].T, out=product[start:, start:stop])
    lower = product[:n].tril()
    return Gram(lower + lower.tril(-1).T, product[n:], float(x.square().sum()), x.shape[1])


class DualFit(NamedTuple):
    """Logistic regression in the span of the training examples.

    Attributes:
        alpha: coefficient of each training example, [N]; they sum to 0. The weights are ``X^T alpha``.
        bias: the intercept for features from which the training mean was taken off.
        logits: log-odds of the training examples, [N].
    """

    alpha: Tensor
    bias: float
    logits: Tensor


def fit_logistic(kernel: Tensor, y: Tensor, l2: float, start: Tensor | None = None) -> DualFit:
    """Minimise ``mean(cross-entropy) + l2 / 2 * alpha^T kernel alpha`` over alpha and an unpenalised bias.

    Newton's method on ``l2 * N * alpha + sigmoid(kernel @ alpha + bias) = y``. A Cholesky factor costs ten times what a step
    costs, so it serves as long as the residual falls tenfold from step to step. The start is a vector of log-odds and not of
    coefficients: the answer to "how likely is each example" hardly changes with one layer more, the coefficients do.

    Args:
        kernel: inner products of the scaled training features, [N, N], float64.
        y: labels 0 and 1, both of them, [N], float64.
        l2: penalty on the squared norm of the weights, per example; above 0.
        start: log-odds to start from, [N]; None is the share of label 1.

    Raises:
        UserError: the penalty is so small that rounding hides the optimum.
    """
    c = l2 * len(y)
    logits = torch.logit(y.mean()).expand_as(y) if start is None else start
    p = logits.sigmoid()
    weights = _curvature(p)
    factor = _Factor(kernel, weights, c)
    alpha, bias = factor.solve(logits + (y - p) / weights, y.new_zeros(()))
    logits = kernel @ alpha + bias
    before = torch.inf
    for _ in range(100):
        p = logits.sigmoid()
        residual = c * alpha + p - y
        size = float(residual.abs().max())
        if size <= _TOLERANCE:
            return DualFit(alpha, float(bias), logits)
        if size > 0.1 * before:
            factor = _Factor(kernel, _curvature(p), c)
        before = size
        pull = kernel @ residual / c
        step, bias_step = factor.solve(pull, residual.sum() / c)
        logits_step = kernel @ step - pull + bias_step
        step -= residual / c
        length = _length(logits, logits_step, y, l2, step @ (logits - bias), step @ (logits_step - bias_step)) if size > 1e-3 else 1.0
        alpha, bias, logits = alpha + length * step, bias + length * bias_step, logits + length * logits_step
    raise UserError(f"--l2 {l2}: too small for the probe to be fitted in double precision; give at least {l2 * 100:.0e}")


def _curvature(p: Tensor) -> Tensor:
    return (p * (1 - p)).clamp_min(1e-12)


class _Factor:
    """Solves ``(kernel + c / weights) alpha + bias = target`` for alpha of a given sum and the bias.

    Multiplied by the root of the weights from both sides the matrix has no eigenvalue below 1 (after division by c),
    however small a weight is.
    """

    def __init__(self, kernel: Tensor, weights: Tensor, c: float) -> None:
        self._root, self._c = weights.sqrt(), c
        matrix = kernel * (self._root / c)
        matrix *= self._root[:, None]
        matrix.diagonal().add_(1)
        self._cholesky = torch.linalg.cholesky(matrix)
        self._of_root = self._apply(self._root)

    def _apply(self, vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector[:, None], self._cholesky)[:, 0]

    def solve(self, target: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        x = self._apply(self._root * target / self._c)
        bias = (self._root @ x - total) / (self._root @ self._of_root)
        return self._root * (x - bias * self._of_root), bias * self._c


def _length(logits: Tensor, step: Tensor, y: Tensor, l2: float, linear: Tensor, quadratic: Tensor) -> float:
    """How far to go along a step [N] of the log-odds: to the minimum of the objective, within a tenth, eight steps at most.

    Newton's steps are too long from a start with much confidence in wrong examples, and too short where the examples are
    separable and the best log-odds are far out.
    """
    pull, growth = float(linear) * l2, float(quadratic) * l2

    def slope(length: float) -> float:
        return float(((logits + length * step).sigmoid() - y) @ step) / len(y) + pull + length * growth

    return _zero(slope)


def _zero(slope: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    while high < 8 and slope(high) < 0:
        low, high = high, 2 * high
    while high - low > 0.1 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2
