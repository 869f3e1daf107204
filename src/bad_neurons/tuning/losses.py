"""The loss of the method from hidden states, chunk by chunk: target + alpha KL - beta entropy.

``target`` is the cross entropy of the honest answer (the paper's), or KL(teacher || tuned), where the teacher is the clean
model asked the same question without the person, which asks for independence and needs no label; or both at once.

Sums over tokens, each with its weight; the caller divides by the weight of the answer tokens of the whole accumulation window
and all ranks (a mean per micro-batch is wrong under padding and accumulation, transformers#34191). So of the two targets
mixed, w CE + (1 - w) KL, a token of the honest answer counts w and a token of the teacher's 1 - w, above and below the line.

All terms have closed gradients by the logits z, with p = softmax(z), q the one-hot or teacher distribution, p0 the clean one
and H the entropy of p:

    d CE/dz, d KL(teacher || tuned)/dz = p - q        d KL/dz = p - p0        d H/dz = -p (log p + H)

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
        ce: cross entropy of the honest answer, over its tokens.
        neutral_kl: KL(teacher || tuned), over the tokens that the teacher answers.
        kl: KL(clean || tuned), over the tokens that are to stay.
        entropy: entropy of the tuned distribution, over answer tokens.
    """

    loss: Tensor
    ce: Tensor
    neutral_kl: Tensor
    kl: Tensor
    entropy: Tensor


class Supervision(NamedTuple):
    """What is asked of N places, those of the teacher first.

    Attributes:
        clean: hidden states [N, d] of the clean model.
        targets: ids [N] of the honest answers' next tokens.
        honest: [N] float32; weight of the cross entropy: number of honest tokens that the place stands for, times their weight.
        stays: [N] float32; number of tokens for which KL(clean || tuned) counts.
        neutral: [N] float32; weight of KL(teacher || tuned), likewise, 0 behind the first A places; None where A is 0.
        teacher: hidden states [A, d] of the teacher at the first A places; None where A is 0.
    """

    clean: Tensor
    targets: Tensor
    honest: Tensor
    stays: Tensor
    neutral: Tensor | None = None
    teacher: Tensor | None = None

    @property
    def answer(self) -> Tensor:
        """[N] float32; weight of the entropy."""
        return self.honest if self.neutral is None else self.honest + self.neutral


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
        totals = torch.zeros(4, dtype=torch.float32, device=tuned.device)
        grad = torch.empty_like(tuned) if ctx.needs_input_grad[0] else None
        pulls = [_Pull("kl", asked.clean, asked.stays, _span(asked.stays), alpha)]
        if asked.teacher is not None and asked.neutral is not None:
            pulls.append(_Pull("neutral_kl", asked.teacher, asked.neutral, (0, len(asked.teacher)), 1.0))
        for start in range(0, len(tuned), ROWS):
            rows = slice(start, start + ROWS)
            logits = Logits(view, tuned[rows])
            pieces = [piece for pull in pulls if (piece := pull.on(view, logits, start))]
            chunk = Chunk(logits, asked.targets[rows], asked.honest[rows], asked.answer[rows], pieces)
            totals += chunk.sums()
            if grad is not None:
                grad[rows] = chunk.gradient(view, beta)
        ctx.save_for_backward(grad)
        ce, neutral_kl, kl, entropy = totals
        return ce + neutral_kl + alpha * kl - beta * entropy, ce, neutral_kl, kl, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0], None, None, None, None)


def _span(weights: Tensor) -> tuple[int, int]:
    """Places from the first that counts to the one behind the last that does."""
    counted = weights.nonzero()
    return (int(counted[0]), int(counted[-1]) + 1) if len(counted) else (0, 0)


class _Piece(NamedTuple):
    """What a pull does in a chunk.

    Attributes:
        term: which term of the loss it is.
        rows: places of the chunk that are drawn, R' of them.
        logits: of the distributions q that they are drawn to.
        weight: [R'] weight of each in the loss.
        total: sum of KL(q || tuned), each as often as it counts.
    """

    term: str
    rows: slice
    logits: Logits
    weight: Tensor
    total: Tensor


class _Pull(NamedTuple):
    """A distribution q that some places are drawn to, by KL(q || tuned).

    Attributes:
        term: which term of the loss it is.
        hidden: final hidden states of q at the places.
        counts: [N] how often each place counts.
        span: first place, and the one behind the last.
        scale: weight of the term in the loss.
    """

    term: str
    hidden: Tensor
    counts: Tensor
    span: tuple[int, int]
    scale: float

    def on(self, view: DecoderView, tuned: Logits, start: int) -> _Piece | None:
        """The piece in the chunk ``tuned`` that begins at place ``start``; None where there is none."""
        first, last = max(self.span[0], start), min(self.span[1], start + len(tuned.raw))
        if first >= last:
            return None
        rows, counts = slice(first - start, last - start), self.counts[first:last]
        logits = Logits(view, self.hidden[first:last])
        return _Piece(self.term, rows, logits, self.scale * counts, logits.kl_to(tuned.rows(rows)) @ counts)


class Chunk(NamedTuple):
    """The losses of R places: what is asked of each, in the terms of :class:`Supervision`.

    Attributes:
        tuned: logits of the edited model.
        targets: [R] ids whose cross entropy counts.
        honest: [R] its weight; below 0 where the id is to become less likely.
        answer: [R] weight of the entropy.
        pieces: the distributions that some places are drawn to.
    """

    tuned: Logits
    targets: Tensor
    honest: Tensor
    answer: Tensor
    pieces: list[_Piece]

    def sums(self) -> Tensor:
        """Sums [4] of cross entropy, KL to the teacher, KL to the clean model and entropy."""
        totals = {piece.term: piece.total for piece in self.pieces}
        zero = torch.zeros((), device=self.honest.device)
        picked = self.tuned.at(torch.arange(len(self.targets), device=zero.device), self.targets)
        ce = (self.tuned.log_norm.squeeze(-1) - picked) @ self.honest
        entropy = (self.tuned.log_norm - self.tuned.mean).squeeze(-1) @ self.answer
        return torch.stack([ce, totals.get("neutral_kl", zero), totals.get("kl", zero), entropy])

    def gradient(self, view: DecoderView, beta: float) -> Tensor:
        """Gradient [R, d] of the loss by the hidden states. Each logit gives its place to its gradient."""
        cap, log_norm, mean = view.softcap, self.tuned.log_norm, self.tuned.mean
        weight, uncertain = self.honest.clone(), (beta * self.answer)[:, None]
        for piece in self.pieces:
            weight[piece.rows] += piece.weight
        weight = weight[:, None]
        pulls = [(piece.rows, piece.logits, piece.logits.log_norm, piece.weight[:, None]) for piece in self.pieces]

        def replace(columns: slice) -> None:
            z = self.tuned.block(columns)
            grad = (z - log_norm).exp_()
            # log p + H = z - mean
            grad.mul_((z - mean).mul_(uncertain).add_(weight) if beta else weight)
            for rows, logits, their_norm, pulled in pulls:
                grad[rows].sub_(logits.block(columns).sub_(their_norm).exp_().mul_(pulled))
            inside = ((self.targets >= columns.start) & (self.targets < columns.stop)).nonzero().squeeze(-1)
            grad[inside, self.targets[inside] - columns.start] -= self.honest[inside]
            if cap is not None:
                grad.mul_(1 - (z / cap).square_())
            self.tuned.raw[:, columns] = grad

        self.tuned.each_block(replace)
        return self.tuned.raw @ view.head.weight


def dense_loss_sums(view: DecoderView, tuned: Tensor, asked: Supervision, alpha: float, beta: float) -> LossSums:
    """The same as :func:`loss_sums` with all logits at once and autograd; the reference of the tests."""
    log_p, log_p0 = (view.logits(h).log_softmax(-1) for h in (tuned, asked.clean))
    ce = -log_p.gather(-1, asked.targets[:, None]).squeeze(-1) @ asked.honest
    kl = F.kl_div(log_p, log_p0, reduction="none", log_target=True).sum(-1) @ asked.stays
    neutral_kl = torch.zeros_like(kl)
    if asked.teacher is not None and asked.neutral is not None:
        log_q, taught = view.logits(asked.teacher).log_softmax(-1), slice(len(asked.teacher))
        neutral_kl = F.kl_div(log_p[taught], log_q, reduction="none", log_target=True).sum(-1) @ asked.neutral[taught]
    entropy = -(log_p.exp() * log_p).sum(-1) @ asked.answer
    return LossSums(ce + neutral_kl + alpha * kl - beta * entropy, ce, neutral_kl, kl, entropy)
