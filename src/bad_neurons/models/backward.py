"""Backward passes through a frozen model: the gradient of a linear map, read by hooks while the pass goes on.

For ``y = x W^T`` the gradient of a loss by W is ``g^T x``, with g its gradient by y. So both are handed to whoever asks, who
keeps what they need of them; no weight requires a gradient, and nothing as large as the weights exists for longer than that.

Legend: B rows, T columns, d hidden size, N places that are read out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bad_neurons.batching import Rows
from bad_neurons.models.passes import open_frame, run_layers
from bad_neurons.models.view import DecoderView

Key = TypeVar("Key", bound=Hashable)


@contextmanager
def linear_gradients(linears: Mapping[Key, nn.Linear], visit: Callable[[Key, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``visit(key, x, g)`` for each of ``linears`` that a backward pass inside the block goes through.

    x [B, T, in] is what the map took and g [B, T, out] the gradient by what it gave, both float32.
    """

    def hook(key: Key) -> Any:
        def seen(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = args[0].detach()
                output.register_hook(lambda g: visit(key, x.float(), g.float()))

        return seen

    handles = [linear.register_forward_hook(hook(key)) for key, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def final_with_graph(view: DecoderView, rows: Rows, at: Tensor, first: int) -> Tensor:
    """Hidden states [N, d] behind the final norm at flat places ``at`` [N], with the graph of layers ``first`` and above."""
    frame = open_frame(view, rows)
    with torch.no_grad():
        hidden = run_layers(view, frame, frame.embedded, last=first)
    hidden = run_layers(view, frame, hidden.detach().requires_grad_(True), first)
    return view.final_norm(hidden.flatten(0, 1)[at])  # type: ignore[no-any-return]
