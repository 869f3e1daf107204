"""AdamW in coordinates in which unrelated text has no preferred direction.

A change D of a linear map moves what the map gives for an input x by ``D x``. On unrelated text that costs about
``tr(D A D^T)``, A the second moment of the inputs there: a step along a direction that the text uses all the time is dear, one
along a direction that it hardly uses is nearly free. AdamW makes steps of one size in every weight, whatever they cost. Here it
works on ``theta`` with ``D = theta R``, ``R = (A / mean(diag A) + damping)^(-1/2)``: the same step in every coordinate of theta
costs the text about the same. This is the input side of a Kronecker-factored natural gradient (K-FAC, arXiv 1503.05671), with the
side effect's curvature instead of the loss's; the hard form of the idea, steps in the null space of A alone, is AlphaEdit's
(arXiv 2410.02355, section 3). Nothing but the path changes: D itself is the parameter, so files, resuming and masks are as with AdamW.

Legend: a linear map is stored [out, in]; D [out, k] or [k, in] is the change of some of its columns or rows; n inputs that D
multiplies (k or in); N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from bad_neurons.batching import batches_by_length, pack_sequences
from bad_neurons.models.passes import open_frame, run_layers
from bad_neurons.models.view import DecoderView

MAX_INPUTS = 4096  # above this an inverse root takes minutes and gigabytes; the diagonal alone is used


class Reads(NamedTuple):
    """What a parameter multiplies.

    Attributes:
        layer: decoder layer of the map.
        linear: the linear map whose input it reads.
        columns: [k], int64; the inputs that it reads, or None for all.
    """

    layer: int
    linear: nn.Linear
    columns: Tensor | None


def input_moments(
    view: DecoderView, reads: Mapping[nn.Parameter, Reads], sequences: Sequence[Sequence[int]], max_tokens: int = 2048
) -> dict[nn.Parameter, Tensor]:
    """Mean of ``x x^T`` [n, n] over all tokens but the first of each sequence (BOS), float32; of ``x^2`` [n] above 4,096 inputs.

    Args:
        view: the clean model.
        reads: what each parameter multiplies.
        sequences: token ids of unrelated text.
        max_tokens: tokens of one batch after padding.
    """
    sums: dict[nn.Parameter, Tensor] = {}
    kept: list[Tensor] = []  # mask [B * T] of the batch that is read

    def hook(parameter: nn.Parameter, columns: Tensor | None) -> Any:
        def add(_linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, 1)[kept[-1]]
            x = (x if columns is None else x.index_select(-1, columns.to(x.device))).float()
            product = x.T @ x if x.shape[1] <= MAX_INPUTS else x.square().sum(0)
            sums[parameter] = sums[parameter] + product if parameter in sums else product

        return add

    handles = [read.linear.register_forward_pre_hook(hook(parameter, read.columns)) for parameter, read in reads.items()]
    count = 0
    try:
        with torch.no_grad():
            for batch in batches_by_length([len(ids) for ids in sequences], max_tokens):
                rows = pack_sequences([sequences[i] for i in batch]).to(view.device)
                kept.append((rows.attention_mask.bool() & (rows.positions > 0)).flatten())
                count += int(kept[-1].sum())
                frame = open_frame(view, rows)
                run_layers(view, frame, frame.embedded, last=max(read.layer for read in reads.values()) + 1)
    finally:
        for handle in handles:
            handle.remove()
    return {parameter: total / count for parameter, total in sums.items()}


def whitener(moment: Tensor, damping: float) -> Tensor:
    """``R = (A / mean(diag A) + damping)^(-1/2)``: [n, n] of a moment A [n, n], [n] of a diagonal [n]; float32."""
    if moment.ndim == 1:
        return (moment / moment.mean() + damping).rsqrt()
    A = moment.double()
    values, vectors = torch.linalg.eigh(A / A.diagonal().mean())
    R: Tensor = (vectors * (values.clamp_min(0) + damping).rsqrt()) @ vectors.T
    return R.float()


class WhitenedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on ``theta``, where each parameter is ``theta R``; a parameter without R has the identity.

    Args:
        params: the parameters.
        whiteners: R of each, [n, n] or [n].
        lr: learning rate of theta.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: decay of the parameters towards zero, decoupled.
    """

    def __init__(
        self,
        params: Any,
        whiteners: Mapping[nn.Parameter, Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._whiteners = dict(whiteners)  # recomputed from the same text when a fit goes on, so no part of the state
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    @override
    def step(self, closure: Any = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        gradient = self._times_whitener(parameter, parameter.grad)  # R is symmetric
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean, square = (state[name] / (1 - beta ** state["step"]) for name, beta in (("mean", beta1), ("square", beta2)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(self._times_whitener(parameter, mean / (square.sqrt() + group["eps"])), alpha=-group["lr"])

    def _times_whitener(self, parameter: nn.Parameter, value: Any) -> Tensor:
        R = self._whiteners.get(parameter)
        if R is None:
            return value  # type: ignore[no-any-return]
        return value * R.to(value) if R.ndim == 1 else value @ R.to(value)  # type: ignore[no-any-return]
