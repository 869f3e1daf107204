"""The loss of the method from hidden states, chunk by chunk: target + alpha KL - beta entropy.

``target`` is the cross entropy of the honest answer (the paper's), or, with a teacher, KL(teacher || tuned): the teacher
is the clean model asked the same question without the person, which asks for independence and needs no label.

Sums over tokens; the caller divides by the number of answer tokens of the whole accumulation window and all ranks (a
mean per micro-batch is wrong under padding and accumulation, transformers#34191).

All terms have closed gradients by the logits z, with p = softmax(z), q the one-hot or teacher distribution, p0 the clean one
and H the entropy of p:

    d target/dz = p - q        d KL/dz = p - p0        d H/dz = -p (log p + H)

So the losses and the gradient of the hidden states come from one walk over chunks of places, with one matrix product for
each kind of logits and one for the gradient, and no logits outlive their chunk (:mod:`bad_neurons.models.head`).

Legend: N supervised places, R places of a chunk, d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bad_neurons.models.head import ROWS, Logits
from bad_neurons.models.view import DecoderView


class LossSums(NamedTuple):
    """Sums over tokens, in nats, of one micro-batch.

    Attributes:
        loss: what is minimised; carries the gradient.
        target: over answer tokens: cross entropy of the honest answer, or KL(teacher || tuned) where there is a teacher.
        kl: KL(clean || tuned), over the tokens that are to stay.
        entropy: entropy of the tuned distribution, over answer tokens.
    """

    loss: Tensor
    target: Tensor
    kl: Tensor
    entropy: Tensor


class Supervision(NamedTuple):
    """What is asked of N places, those of answers first.

    Attributes:
        clean: hidden states [N, d] of the clean model.
        targets: ids [N] of the next tokens; read only at answers and without a teacher.
        answer: [N] float32; number of answer tokens that the place stands for (target and entropy).
        stays: [N] float32; number of tokens for which KL(clean || tuned) counts.
        teacher: hidden states [A, d] of the A places of answers, whose distribution replaces the honest token; or None.
    """

    clean: Tensor
    targets: Tensor
    answer: Tensor
    stays: Tensor
    teacher: Tensor | None = None


def loss_sums(view: DecoderView, tuned: Tensor, asked: Supervision, alpha: float, beta: float) -> LossSums:
    """The losses from final hidden states.

    Args:
        view: gives the head (frozen) and the final soft cap.
        tuned: hidden states [N, d] of the edited model, with gradients.
        asked: what is asked of each place.
        alpha: weight of the KL.
        beta: weight of the entropy.
    """
    return LossSums(*_HeadLoss.apply(tuned, asked, view, alpha, beta))  # type: ignore[no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tuned: Tensor, asked: Supervision, view: DecoderView, alpha: float, beta: float) -> tuple[Tensor, ...]:
        totals = torch.zeros(3, dtype=torch.float32, device=tuned.device)
        grad = torch.empty_like(tuned) if ctx.needs_input_grad[0] else None
        answers, (first, last) = int(asked.answer.count_nonzero()), _span(asked.stays)
        for start in range(0, len(tuned), ROWS):
            rows = slice(start, start + ROWS)
            tuned_logits = Logits(view, tuned[rows])
            pulls = []
            if asked.teacher is not None and start < answers:
                pulls.append(_pull("target", tuned_logits, Logits(view, asked.teacher[rows]), 0, asked.answer[rows]))
            if first < start + ROWS and start < last:
                begin, end = max(first, start), min(last, start + ROWS)
                pulls.append(_pull("kl", tuned_logits, Logits(view, asked.clean[begin:end]), begin - start, asked.stays[rows]))
            chunk = _Chunk(
                tuned_logits, asked.answer[rows], asked.stays[rows], asked.targets[rows] if asked.teacher is None else None, pulls
            )
            totals += chunk.sums()
            if grad is not None:
                grad[rows] = chunk.gradient(view, alpha, beta)
        ctx.save_for_backward(grad)
        target, kl, entropy = totals
        return target + alpha * kl - beta * entropy, target, kl, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0], None, None, None, None)


def _span(weights: Tensor) -> tuple[int, int]:
    """Places from the first that counts to the one behind the last that does."""
    counted = weights.nonzero()
    return (int(counted[0]), int(counted[-1]) + 1) if len(counted) else (0, 0)


class _Pull(NamedTuple):
    """A distribution q that some places of a chunk are drawn to.

    Attributes:
        term: ``target`` or ``kl``.
        rows: which places of the chunk, R' of them.
        logits: of q.
        weight: [R'] how often each counts.
        total: sum of weight * KL(q || tuned).
    """

    term: str
    rows: slice
    logits: Logits
    weight: Tensor
    total: Tensor


def _pull(term: str, tuned: Logits, drawn_to: Logits, first: int, weights: Tensor) -> _Pull:
    rows = slice(first, first + len(drawn_to.raw))
    return _Pull(term, rows, drawn_to, weights[rows], drawn_to.kl_to(tuned.rows(rows)) @ weights[rows])


class _Chunk(NamedTuple):
    """The losses of R places: what is asked of each, in the terms of :class:`Supervision`."""

    tuned: Logits
    answer: Tensor
    stays: Tensor
    targets: Tensor | None
    pulls: list[_Pull]

    def sums(self) -> Tensor:
        """Sums [3] of target, KL and entropy."""
        totals = {pull.term: pull.total for pull in self.pulls}
        zero = torch.zeros((), device=self.answer.device)
        if self.targets is not None:
            picked = self.tuned.at(torch.arange(len(self.targets), device=zero.device), self.targets)
            totals["target"] = (self.tuned.log_norm.squeeze(-1) - picked) @ self.answer
        entropy = (self.tuned.log_norm - self.tuned.mean).squeeze(-1) @ self.answer
        return torch.stack([totals.get("target", zero), totals.get("kl", zero), entropy])

    def gradient(self, view: DecoderView, alpha: float, beta: float) -> Tensor:
        """Gradient [R, d] of target + alpha KL - beta entropy by the hidden states. Each logit gives its place to its gradient."""
        cap, log_norm, mean = view.softcap, self.tuned.log_norm, self.tuned.mean
        weight, uncertain = (self.answer + alpha * self.stays)[:, None], (beta * self.answer)[:, None]
        pulls = [(p.rows, p.logits, p.logits.log_norm, (p.weight if p.term == "target" else alpha * p.weight)[:, None]) for p in self.pulls]

        def replace(columns: slice) -> None:
            z = self.tuned.block(columns)
            grad = (z - log_norm).exp_()
            # log p + H = z - mean
            grad.mul_((z - mean).mul_(uncertain).add_(weight) if beta else weight)
            for rows, logits, their_norm, pulled in pulls:
                grad[rows].sub_(logits.block(columns).sub_(their_norm).exp_().mul_(pulled))
            if self.targets is not None:
                inside = ((self.targets >= columns.start) & (self.targets < columns.stop)).nonzero().squeeze(-1)
                grad[inside, self.targets[inside] - columns.start] -= self.answer[inside]
            if cap is not None:
                grad.mul_(1 - (z / cap).square_())
            self.tuned.raw[:, columns] = grad

        self.tuned.each_block(replace)
        return self.tuned.raw @ view.head.weight


def dense_loss_sums(view: DecoderView, tuned: Tensor, asked: Supervision, alpha: float, beta: float) -> LossSums:
    """The same as :func:`loss_sums` with all logits at once and autograd; the reference of the tests."""
    log_p, log_p0 = (view.logits(h).log_softmax(-1) for h in (tuned, asked.clean))
    if asked.teacher is None:
        target = -log_p.gather(-1, asked.targets[:, None]).squeeze(-1) @ asked.answer
    else:
        log_q, at = view.logits(asked.teacher).log_softmax(-1), asked.answer > 0
        target = F.kl_div(log_p[at], log_q, reduction="none", log_target=True).sum(-1) @ asked.answer[at]
    kl = F.kl_div(log_p, log_p0, reduction="none", log_target=True).sum(-1) @ asked.stays
    entropy = -(log_p.exp() * log_p).sum(-1) @ asked.answer
    return LossSums(target + alpha * kl - beta * entropy, target, kl, entropy)
