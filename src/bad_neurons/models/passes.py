"""Partial forward passes: open the model in front of its layers, run some of them, read inside, stop early.

One way that fits every Hugging Face decoder: the backbone runs once with stand-ins for its layers, which do nothing but
write down what they are called with (masks, rotary embeddings). With those arguments any stretch of layers can be run by
hand, from the embeddings or from a hidden state that was kept, and rows that hold several sequences get their mask.

Legend: B rows, T columns, d hidden size, N places that are read out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bad_neurons.batching import Rows
from bad_neurons.models.view import DecoderView, LayerView


class _Stop(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass from inside it."""


class Frame(NamedTuple):
    """What is the same for every pass over the same rows, whatever the layers hold.

    Attributes:
        embedded: input [B, T, d] of the first layer.
        calls: keyword arguments of each layer.
    """

    embedded: Tensor
    calls: list[dict[str, Any]]


def open_frame(view: DecoderView, rows: Rows) -> Frame:
    """Embed ``rows`` and find what each layer would be called with; no layer runs."""
    calls: list[dict[str, Any]] = []
    embedded: list[Tensor] = []

    def stand_in(hidden_states: Tensor, **call: Any) -> Tensor:
        embedded.append(hidden_states)
        calls.append(call)
        return hidden_states

    with replaced([part.layer for part in view.layers], stand_in), torch.no_grad():
        view.backbone(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, position_ids=rows.positions if rows.branched else None,
            use_cache=False,
        )  # fmt: skip
    if rows.branched:
        masks: dict[int, Tensor] = {}  # layers of one kind share one mask
        for call in calls:
            plain = call["attention_mask"]
            if id(plain) not in masks:
                masks[id(plain)] = _tree_mask(plain, rows, embedded[0].dtype)
        calls = [{**call, "attention_mask": masks[id(call["attention_mask"])]} for call in calls]
    return Frame(embedded[0], calls)


@contextmanager
def replaced(modules: Sequence[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """``stand_in`` in place of the modules' ``forward`` inside the block."""
    try:
        for module in modules:
            module.forward = stand_in
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _tree_mask(plain: Tensor | None, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Mask [B, 1, T, T] of rows with several sequences, from the mask that the model made for one sequence a row.

    What the model's own mask says of the longest row, which has no padding, is read as a rule about positions (causal, and
    the sliding window where the layer has one) and holds between tokens that are on one way from a root.
    """
    positions = rows.positions
    if plain is None:  # sdpa was to skip the mask: causal and nothing else
        rule = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool, device=positions.device).tril()
    else:
        longest = int(rows.attention_mask.sum(1).argmax())
        rule = plain[min(longest, len(plain) - 1), 0]
        rule = rule if rule.dtype == torch.bool else rule >= 0
    allowed = (rows.reach() & rule[positions[:, :, None], positions[:, None, :]])[:, None]
    if plain is None or plain.dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


Runner = Callable[[nn.Module, Tensor, dict[str, Any]], Tensor]


def plain(layer: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    """Run a layer as it is."""
    output: Tensor = layer(hidden, **call)
    return output


def checkpointed(run: Runner) -> Runner:
    """Run layers keeping only their inputs for the backward pass, which runs each again."""
    return lambda layer, hidden, call: checkpoint(run, layer, hidden, call, use_reentrant=False)  # type: ignore[no-any-return]


def compiled() -> Runner:
    """Run layers compiled by torch.compile, each with its edits; lengths may vary."""
    layers: dict[nn.Module, Any] = {}

    def run(layer: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        if layer not in layers:
            # Compiled code is kept by code object and looked up without a look at hooks (the edits): one object a layer.
            own = FunctionType(plain.__code__.replace(co_name=f"layer_{len(layers)}"), globals())
            layers[layer] = torch.compile(own, dynamic=True)
        output: Tensor = layers[layer](layer, hidden, call)
        return output

    return run


def run_layers(view: DecoderView, frame: Frame, hidden: Tensor, first: int = 0, last: int | None = None, run: Runner = plain) -> Tensor:
    """Hidden states [B, T, d] behind layer ``last - 1``.

    Args:
        view: the model, with whatever edits are on.
        frame: from :func:`open_frame` of the same rows.
        hidden: input [B, T, d] of layer ``first``.
        first: layer to begin with.
        last: layer to end in front of; None for all layers (the final norm does not run).
        run: how to run a layer.
    """
    for part, call in zip(view.layers[first:last], frame.calls[first:last], strict=True):
        hidden = run(part.layer, hidden, call)
    return hidden


def finish(view: DecoderView, frame: Frame, hidden: Tensor, first: int, at: Tensor, run: Runner = plain) -> Tensor:
    """Hidden states [N, d] behind the final norm at flat places ``at`` [N], from the input [B, T, d] of layer ``first``.

    Nothing reads the last layer's output elsewhere, so what follows its attention runs at those places alone.
    """
    end = len(view.layers) - 1
    hidden = run_layers(view, frame, hidden, first, end, run)
    if run is plain:
        hidden = _last_layer(view.layers[end], hidden, frame.calls[end], at)
    else:
        hidden = run(view.layers[end].layer, hidden, frame.calls[end]).flatten(0, 1)[at]
    return view.final_norm(hidden)  # type: ignore[no-any-return]


def _last_layer(part: LayerView, hidden: Tensor, call: dict[str, Any], at: Tensor) -> Tensor:
    """Output [N, d] of a layer at flat places ``at``: attention over all positions, everything else at those alone."""
    given: dict[str, Any] = {}

    def take(*args: Any, **kwargs: Any) -> None:
        given.update(args=args, kwargs=kwargs)
        raise _Stop

    with replaced([part.attention], take), suppress(_Stop):
        part.layer(hidden, **call)
    mixed, *rest = part.attention(*given["args"], **given["kwargs"])
    picked = mixed.flatten(0, 1)[at][None]
    with replaced([part.attention], lambda *_, **__: (picked, *rest)):
        output: Tensor = part.layer(hidden.flatten(0, 1)[at][None], **call)
    return output[0]


def final_hidden(view: DecoderView, rows: Rows, at: Tensor) -> Tensor:
    """Hidden states [N, d] behind the final norm at flat places ``at`` [N] of ``rows``, without gradients."""
    with torch.no_grad():
        frame = open_frame(view, rows)
        return finish(view, frame, frame.embedded, 0, at)


class Switch(Protocol):
    """An edit on a model that can be switched off.

    Attributes:
        first_layer: the lowest layer that it changes.
    """

    @property
    def first_layer(self) -> int: ...  # noqa: D102

    def disabled(self) -> AbstractContextManager[None]:
        """The clean model inside the block."""


def before_and_after(view: DecoderView, rows: Rows, at: Tensor, edit: Switch | None) -> tuple[Tensor, Tensor]:
    """Final hidden states [N, d] at flat places ``at`` [N], with ``edit`` off and on, without gradients.

    Layers below the first edited one run once for both. Without an edit both are the same tensor.
    """
    with torch.no_grad():
        frame = open_frame(view, rows)
        if edit is None:
            return (final := finish(view, frame, frame.embedded, 0, at)), final
        first = edit.first_layer
        hidden = run_layers(view, frame, frame.embedded, last=first)
        with edit.disabled():
            before = finish(view, frame, hidden, first, at)
        return before, finish(view, frame, hidden, first, at)


def visit_mlp_outputs(view: DecoderView, rows: Rows, layers: Sequence[int], visit: Callable[[int, Tensor], None]) -> None:
    """Call ``visit(layer, output)`` with what the MLP block of each of ``layers`` adds to the residual stream, [B, T, d]."""
    points = {layer: view.layers[layer].sae_point for layer in layers}
    visit_points(view, rows, points, lambda layer, _, output: visit(layer, output))


def visit_points(view: DecoderView, rows: Rows, points: Mapping[int, nn.Module], visit: Callable[[int, Tensor, Tensor], None]) -> None:
    """Call ``visit(layer, input, output)`` with what one module of each of some layers takes and gives, [B, T, ...].

    Without gradients, in the order of the layers, while the pass goes on, so nothing of it need be kept. The pass ends behind
    the last of ``points``; later layers and the head never run.
    """
    last = max(points)

    def hook(layer: int) -> Any:
        def seen(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            visit(layer, args[0], output)
            if layer == last:
                raise _Stop

        return seen

    frame = open_frame(view, rows)  # before the hooks, which would see the layers' stand-ins
    handles = [module.register_forward_hook(hook(layer)) for layer, module in points.items()]
    try:
        with torch.no_grad():
            run_layers(view, frame, frame.embedded, last=last + 1)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
