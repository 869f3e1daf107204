"""Where numbers went wrong: which tensors hold NaN or infinity, and which module gave the first ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bad_neurons.errors import RunError


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. One wait for the device, however many there are."""
    if not tensors:
        return []
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, fine in zip(tensors, finite, strict=True) if not fine]


def named(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if names[most:] else ""
    return ", ".join(names[:most]) + more


def first_nonfinite_output(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Name of the first module of ``model`` that gives NaN or infinity when ``run`` runs it; None where all that they give is finite."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, Tensor) and not first.isfinite().all():
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def check_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: what a model or an SAE gave.
        what: what they are, such as ``layer 5: activations``.

    Raises:
        RunError: one of the values is NaN or infinite.
    """
    if not values.isfinite().all():
        wrong = values[~values.isfinite()]
        kinds = " and ".join(name for name, there in (("NaN", wrong.isnan().any()), ("infinity", wrong.isinf().any())) if there)
        raise RunError(
            f"{what}: {len(wrong)} of {values.numel()} values are {kinds} ({str(values.dtype).removeprefix('torch.')}); float16 overflows "
            "in Gemma models, so give dtype bfloat16 or float32; if it is one of these, the weights of the model are damaged"
        )
