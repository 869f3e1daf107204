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

from typing import NamedTuple

import torch
from torch import Tensor

from bad_neurons.models.head import token_log_probs
from bad_neurons.models.view import DecoderView
from bad_neurons.tuning.losses import Supervision, loss_sums

SCALE = 2.0  # c, in nats


class Pairs(NamedTuple):
    """Both positions of the records of a batch, token by token.

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
        found = token_log_probs(view, hidden, pairs.at, pairs.targets).to(pairs.sign)
        return torch.zeros(pairs.records, device=found.device).index_add_(0, pairs.record, pairs.sign * found)


def shift_loss(view: DecoderView, tuned: Tensor, pairs: Pairs, neutral: Tensor) -> Shift:
    """The term from final hidden states.

    Args:
        view: gives the head (frozen) and the final soft cap.
        tuned: hidden states [N, d] of the edited model, with gradients.
        pairs: which token is asked of which place.
        neutral: log-odds [R] of the clean model without the person.
    """
    shifts = log_odds(view, tuned.detach(), pairs) - neutral
    root = torch.sqrt(1 + (shifts / SCALE).square())
    weights = -(shifts / root)[pairs.record] * pairs.sign
    hidden = tuned[pairs.at]
    asked = Supervision(hidden.detach(), pairs.targets, weights, torch.zeros_like(weights))
    surrogate = loss_sums(view, hidden, asked, alpha=0.0, beta=0.0).loss
    value = SCALE**2 * (root - 1).sum()
    return Shift(surrogate - surrogate.detach() + value, shifts)  # the value of h, the gradient of the cross entropy
