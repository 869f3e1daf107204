"""The probe as a small dense problem: Gram matrices of layers, and logistic regression on them.

With an L2 penalty the best weights are a combination of the training examples, ``w = X^T alpha``, so a probe needs no more of
its features than the inner products of the examples; and the inner products of features side by side are the sum of those
of the parts. One pass over the features of each layer is enough for the probes of all sets of layers.

Legend: N training examples, M validation examples, D features of a layer (or of several side by side).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bad_neurons.errors import UserError

_TOLERANCE = 1e-6  # in units of a probability
_MAX_STEPS = 200
_COLUMNS, _BLOCKS = 512, 3  # parts of the features that fit into a cache


class Gram(NamedTuple):
    """Inner products of examples from which the training mean was taken off.

    Taking it off changes nothing but the bias, which has no penalty, and rounding does less harm: the mean is about half of
    the energy of pooled features.

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


def gram(train: Tensor, validation: Tensor) -> Gram:
    """Gram matrices of features [N, D] and [M, D], computed and kept in the features' dtype.

    Rounding in float32 moves the log-odds of a probe by about 1e-5 at a penalty of 0.1, and by 1e-3 where the penalty hardly
    holds (1e-3 on residual features); give float64 features for less.
    """
    n, width = train.shape
    product = train.new_zeros(n + len(validation), n)
    room = train.new_empty(len(product), min(_COLUMNS, width))
    rows = -(-n // _BLOCKS)
    for left in range(0, width, _COLUMNS):
        part = train[:, left : left + _COLUMNS]
        centred, mean = room[:, : part.shape[1]], part.mean(0)
        torch.sub(part, mean, out=centred[:n])
        torch.sub(validation[:, left : left + _COLUMNS], mean, out=centred[n:])
        for top in range(0, n, rows):  # only the blocks on and below the diagonal
            block = slice(top, min(top + rows, n))
            product[top:, block] += _products(centred[top:], centred[block])
    square = product[:n].tril_()
    square += square.tril(-1).T
    squares = float(torch.linalg.vector_norm(train, dim=1).double().square().sum())
    return Gram(square, product[n:], squares, width)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``, by oneDNN where there is one: on AMD's processors MKL leaves half of their width unused."""
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.nn.functional.linear(a.to_mkldnn(), b.to_mkldnn()).to_dense()
    return a @ b.T


def side_by_side(one: Gram, other: Gram) -> Gram:
    """Gram matrices of the features of both."""
    return Gram(one.train + other.train, one.validation + other.validation, one.squares + other.squares, one.width + other.width)


def mean_square(grams: Sequence[Gram]) -> float:
    """Mean square of all training features: the square of the one number that ``LinearProbe`` divides them by."""
    mean = sum(g.squares for g in grams) / (len(grams[0].train) * sum(g.width for g in grams))
    return max(mean, 1e-16)  # LinearProbe's bound, for features of nothing but zeros


class DualFit(NamedTuple):
    """Logistic regression in the span of the training examples.

    Attributes:
        alpha: coefficient of each training example, [N], float64; they sum to 0. The weights are ``X^T alpha``, X scaled.
        bias: the intercept, for features from which the training mean was taken off.
        logits: log-odds of the training examples, [N], float64.
    """

    alpha: Tensor
    bias: float
    logits: Tensor


def validation_logits(fit: DualFit, grams: Sequence[Gram]) -> Tensor:
    """Log-odds [M], float64, that a fit to features side by side gives the validation examples."""
    products = torch.stack([g.validation @ fit.alpha.to(g.validation) for g in grams]).double().sum(0)
    return products / mean_square(grams) + fit.bias


class DualLogistic:
    """Fits probes to the same labels, one after the other, in the same memory.

    Fresh memory for each would cost half as much time again as the sums. One object belongs to one thread.

    Args:
        y: labels 0 and 1, both of them, [N].
        l2: penalty on the squared norm of the weights, per example; above 0.

    Attributes:
        base_rate: log-odds [N] of label 1 without any features.
    """

    def __init__(self, y: Tensor, l2: float) -> None:
        n = len(y)
        self._y, self._l2 = y.double(), l2
        self.base_rate = torch.logit(self._y.mean()).expand(n)
        self._kernel = torch.empty(n, n, dtype=torch.float64)
        self._matrix = torch.empty(n, n)
        self._cholesky = torch.empty(n, n).mT  # LAPACK's order, else it is copied

    def fit(self, grams: Sequence[Gram], start: Tensor | None = None) -> DualFit:
        """Minimise ``mean(cross-entropy) + l2 / 2 * |w|^2`` over the weights and a bias that has no penalty.

        Newton's method on ``l2 * N * alpha + sigmoid(kernel @ alpha + bias) = y`` until both sides differ by less than a
        millionth for each example. A factor costs more than ten steps, so one serves as long as the error falls by half from
        step to step. The start is a vector of log-odds and not of coefficients: one layer more hardly changes how likely each
        example is, but it changes the coefficients beyond use.

        Args:
            grams: of features that lie side by side.
            start: log-odds to start from, [N]; None is the share of label 1.

        Raises:
            UserError: the penalty is so small that rounding hides the optimum.
        """
        scale = mean_square(grams)
        kernel, y, l2 = self._sum(grams), self._y, self._l2 * scale  # raw features with as much more penalty: the same problem
        c = l2 * len(y)
        logits = self.base_rate if start is None else start
        p = logits.sigmoid()
        factor = self._factor(kernel, p, c)
        alpha, bias = factor.solve(factor.root * logits + (y - p) / factor.root)
        logits = kernel @ alpha + bias
        before = torch.inf
        for _ in range(_MAX_STEPS):
            p = logits.sigmoid()
            residual = torch.add(y - p, alpha, alpha=-c)
            error = float(residual.abs().max())
            if error <= _TOLERANCE:
                return DualFit(alpha * scale, float(bias), logits)
            if error > 0.5 * before:
                factor = self._factor(kernel, p, c)
            before = error
            step, bias_step = factor.solve(residual / factor.root)
            logits_step = kernel @ step + bias_step
            length = 1.0
            if error > 1e-2:
                penalty = torch.stack([step @ (logits - bias), step @ (logits_step - bias_step)]) * l2
                length = _length(logits, logits_step, y, *penalty.tolist())
            alpha = torch.add(alpha, step, alpha=length)
            bias = torch.add(bias, bias_step, alpha=length)
            logits = torch.add(logits, logits_step, alpha=length)
        raise self._too_small()

    def _sum(self, grams: Sequence[Gram]) -> Tensor:
        """Inner products of the training features side by side, [N, N]."""
        if len(grams) == 1:
            return self._kernel.copy_(grams[0].train)
        torch.add(grams[0].train, grams[1].train, out=self._kernel)
        for gram in grams[2:]:
            self._kernel.add_(gram.train)
        return self._kernel

    def _factor(self, kernel: Tensor, p: Tensor, c: float) -> _Factor:
        curvature = p * (1 - p)
        root = curvature.sqrt().clamp_min(1e-5)
        largest = float(curvature @ kernel.diagonal()) / c  # the trace bounds the largest eigenvalue
        if largest * torch.finfo(torch.float32).eps > 0.05:  # too much for steps in single precision
            self._matrix, self._cholesky = self._matrix.double(), self._cholesky.double()
        torch.mul(kernel, root / c, out=self._matrix).mul_(root[:, None].to(self._matrix))
        self._matrix.diagonal().add_(1)
        try:
            return _Factor(root, torch.linalg.cholesky(self._matrix, out=self._cholesky), c)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise self._too_small() from error

    def _too_small(self) -> UserError:
        return UserError(f"--l2 {self._l2}: too small for the probe to be fitted with the precision of a double; give a larger one")


class _Factor:
    """Solves ``(kernel + c / curvature) alpha + bias = target`` for a bias, and for alpha with the sum 0.

    With the root of the curvature multiplied to both sides, and divided by c, the matrix has no eigenvalue below 1 however
    little curvature an example has; ``cholesky`` is the factor of that.
    """

    def __init__(self, root: Tensor, cholesky: Tensor, c: float) -> None:
        self.root, self._cholesky, self._outer = root, cholesky, root / c
        self._of_root = self._apply(root)
        self._norm = root @ self._of_root

    def solve(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha [N] and the bias, for ``target`` [N] multiplied with ``root``."""
        x = self._apply(target)
        bias = (self.root @ x) / self._norm
        return self._outer * torch.addcmul(x, self._of_root, bias, value=-1), bias

    def _apply(self, vector: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._cholesky, vector[:, None].to(self._cholesky), upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self._cholesky.mT, half, upper=True)
        return whole[:, 0].to(vector)


def _length(logits: Tensor, step: Tensor, y: Tensor, linear: float, quadratic: float) -> float:
    """How far to go along a step [N] of the log-odds: about to the minimum of the objective, eight steps at most.

    Newton's step is too long from a start that is sure of wrong answers, and too short where the examples are separable and
    the best log-odds are far out.

    Args:
        logits: log-odds now.
        step: their change.
        y: labels.
        linear: slope of the penalty along the step, at its beginning.
        quadratic: growth of that slope over the step.
    """

    def slope(length: float) -> float:
        return float(((logits + length * step).sigmoid() - y) @ step) / len(y) + linear + length * quadratic

    low, high, here = 0.0, 1.0, slope(1.0)
    if abs(here) < 0.1 * abs(slope(0.0)):
        return 1.0
    while here < 0 and high < 8:
        low, high = high, 2 * high
        here = slope(high)
    while high - low > 0.2 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2
