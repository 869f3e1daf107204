"""The opinion shift itself as a term of the loss.

The shift s of a record is what is measured in the end: the log-odds of the agreeing position over the other one under the
person's prompt, minus the clean model's without the person. KL to the clean model's own view (target ``neutral``) asks for more, the whole
distribution at every word; this asks for that one number to be 0, and for nothing to be said of right or wrong. The
term is the pseudo-Huber loss ``h(s) = c^2 (sqrt(1 + (s / c)^2) - 1)``: quadratic for small shifts, with slope at most c, so a
few records with a large shift do not drown the others.

Since ``ds`` is a signed sum of the answers' log-probabilities, the gradient of h is that of a cross entropy with the weights
``- h'(s) sign``, and the head's blocks (:mod:`bad_neurons.tuning.losses`) give it like any other.

Legend: N places of a batch, A of them taught, M answer tokens of both positions, R records, d hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bad_neurons.models.head import ROWS, Logits, token_log_probs
from bad_neurons.models.view import DecoderView
from bad_neurons.tuning.losses import Chunk

SCALE = 2.0  # c, in nats


class Pairs(NamedTuple):
    """Both positions of the records of a batch, token by token. Where both begin alike, nothing is asked: it cancels.

    Attributes:
        at: [M], int64; which of the N places predicts the token. It is one of the A first, which the teacher has as well.
        targets: [M], int64; the token's id.
        record: [M], int64; which record it belongs to.
        sign: [M], float32; 1 for the agreeing position, -1 for the other.
        records: R.
    """

    at: Tensor
    targets: Tensor
    record: Tensor
    sign: Tensor
    records: int


class Shift(NamedTuple):
    """The term and what it is made of.

    Attributes:
        loss: sum of h(s) over records; carries the gradient.
        shifts: [R], float32, nats.
    """

    loss: Tensor
    shifts: Tensor


def log_odds(view: DecoderView, hidden: Tensor, pairs: Pairs) -> Tensor:
    """Log-odds [R], float32, of the agreeing position from final hidden states [A or more, d], without gradients."""
    with torch.no_grad():
        return _by_record(pairs, token_log_probs(view, hidden, pairs.at, pairs.targets).to(pairs.sign))


def shift_loss(view: DecoderView, tuned: Tensor, pairs: Pairs, neutral: Tensor) -> Shift:
    """The term from final hidden states.

    Args:
        view: gives the head (frozen) and the final soft cap.
        tuned: hidden states [N, d] of the edited model, with gradients.
        pairs: which token is asked of which place.
        neutral: log-odds [R] of the clean model without the person.
    """
    return Shift(*_ShiftLoss.apply(tuned[pairs.at], view, pairs, neutral))  # type: ignore[no-untyped-call]


class _ShiftLoss(torch.autograd.Function):
    """The weights are known when all log-probabilities are, so the logits of all M tokens wait for them, in the model's dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, view: DecoderView, pairs: Pairs, neutral: Tensor) -> tuple[Tensor, Tensor]:
        logits = [Logits(view, part) for part in hidden.split(ROWS)]
        targets = pairs.targets.split(ROWS)
        found = [
            one.at(torch.arange(len(ids), device=ids.device), ids) - one.log_norm.squeeze(-1)
            for one, ids in zip(logits, targets, strict=True)
        ]
        shifts = _by_record(pairs, torch.cat(found)) - neutral
        root = torch.sqrt(1 + (shifts / SCALE).square())
        weights = (-(shifts / root)[pairs.record] * pairs.sign).split(ROWS)
        if ctx.needs_input_grad[0]:
            chunks = [Chunk(one, ids, w, torch.zeros_like(w), []) for one, ids, w in zip(logits, targets, weights, strict=True)]
            ctx.save_for_backward(torch.cat([chunk.gradient(view, beta=0.0) for chunk in chunks]))
        ctx.mark_non_differentiable(shifts)
        return SCALE**2 * (root - 1).sum(), shifts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0], None, None, None)


def _by_record(pairs: Pairs, log_probs: Tensor) -> Tensor:
    """Log-odds [R] from the log-probability [M] of each token."""
    # Not by index_add_: on a GPU its order, and with it the last bit, changes from run to run.
    own = pairs.record == torch.arange(pairs.records, device=log_probs.device)[:, None]
    return torch.where(own, pairs.sign * log_probs, 0.0).sum(1)
