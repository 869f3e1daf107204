"""A view on any Hugging Face decoder: its layers, their gated MLPs, and the place where the SAE reads.

Everything is found by structure: the layer list is the module list whose members hold a gated MLP, and the hook point
is found by watching one layer run. So Gemma 2 and 3 (also inside a multimodal wrapper), Llama, Qwen 2 and 3 and
Mistral need no entry here, and a new family with the same shape works as it is.

Legend: L layers, d hidden size, m MLP intermediate size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bad_neurons.errors import UserError

MATRICES = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LayerView:
    """One decoder layer.

    Attributes:
        layer: the decoder layer.
        attention: its attention, whose output is added to the residual stream at each position.
        mlp: its gated MLP with linear children ``gate_proj``, ``up_proj`` [m, d] and ``down_proj`` [d, m].
        sae_point: the module whose output is added to the residual stream: the norm behind the MLP where the family has
            one (Gemma: ``post_feedforward_layernorm``; Gemma Scope, arXiv 2408.05147 section 3.1), else the MLP itself.
    """

    layer: nn.Module
    attention: nn.Module
    mlp: nn.Module
    sae_point: nn.Module

    def matrix(self, name: str) -> nn.Linear:
        """A linear map of the MLP or of the attention, by its name in :data:`MATRICES` or :data:`ATTENTION`.

        Raises:
            UserError: the attention has no such map.
        """
        found = getattr(self.attention if name in ATTENTION else self.mlp, name, None)
        if found is None:
            raise UserError(f"model: its attention {type(self.attention).__name__} has no {name}; the axis heads needs q_proj and o_proj")
        return bare(found)  # type: ignore[return-value]

    def gain(self) -> Tensor:
        """Gain [d], float32, of the norm between ``down_proj`` and the residual stream; ones where there is none.

        A root-mean-square norm maps the all-ones vector (whose root mean square is 1) to its gain, whether the family
        stores the gain itself (Llama) or the gain minus one (Gemma).
        """
        weight = self.matrix("down_proj").weight
        ones = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
        if self.sae_point is self.mlp:
            return ones
        with torch.no_grad():
            gain: Tensor = self.sae_point(ones).float()
        return gain


@dataclass(frozen=True)
class DecoderView:
    """A decoder's parts, see :func:`view_decoder`.

    Attributes:
        model: the whole causal language model.
        backbone: the module that runs the embeddings, the layers and the final norm.
        layers: one :class:`LayerView` a layer, in order.
        final_norm: the norm behind the last layer.
        head: the linear map [V, d] from the final hidden state to the logits.
        softcap: the cap ``c`` of ``c * tanh(logits / c)``, or None.
    """

    model: nn.Module
    backbone: nn.Module
    layers: tuple[LayerView, ...]
    final_norm: nn.Module
    head: nn.Linear
    softcap: float | None

    @property
    def d_model(self) -> int:
        """Hidden size d."""
        return self.layers[0].matrix("down_proj").out_features

    @property
    def d_mlp(self) -> int:
        """MLP intermediate size m."""
        return self.layers[0].matrix("down_proj").in_features

    @property
    def head_dim(self) -> int:
        """Size D of one attention head."""
        size: int = self.layers[0].attention.head_dim  # type: ignore[assignment]
        return size

    @property
    def device(self) -> torch.device:
        """Where the model's weights lie."""
        return self.head.weight.device

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V], float32, of final hidden states [..., d], soft cap included."""
        logits: Tensor = self.head(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def check_layers(self, layers: list[int], option: str) -> None:
        """Refuse layer numbers that this model does not have.

        Raises:
            UserError: a number is outside 0..L-1, or there is none.
        """
        wrong = [layer for layer in layers if not 0 <= layer < len(self.layers)]
        if wrong or not layers:
            raise UserError(f"{option}: {wrong or 'empty'}: this model has layers 0 to {len(self.layers) - 1}")


def view_decoder(model: nn.Module) -> DecoderView:
    """Find the parts of ``model``.

    Raises:
        UserError: the model has no stack of layers with a gated MLP (GPT-2, OPT, mixtures of experts, fused gates).
    """
    stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and _find_mlp(m[0])), None)
    mlps = [mlp for layer in stack or () if (mlp := _find_mlp(layer))]
    if stack is None or len(mlps) < len(stack):
        kind = type(model).__name__
        raise UserError(
            f"model {kind}: no gated MLP ({', '.join(MATRICES)}) in each of its layers, so its neurons cannot be chosen; "
            "Gemma, Llama, Qwen and Mistral models have one"
        )
    backbone = next(m for m in model.modules() if any(child is stack for child in m.children()))
    norm_behind = _norm_behind_mlp(model, backbone, stack[0], mlps[0])
    layers = tuple(
        LayerView(layer, _find_attention(layer, mlp), mlp, getattr(layer, norm_behind) if norm_behind else mlp)
        for layer, mlp in zip(stack, mlps, strict=True)
    )
    return DecoderView(model, backbone, layers, _final_norm(backbone, stack), _head(model), _softcap(model))


def bare(module: nn.Module) -> nn.Module:
    """What an adapter of peft wraps, or the module itself where it is none."""
    wrapped: nn.Module = getattr(module, "base_layer", module)
    return wrapped


def _find_mlp(layer: nn.Module) -> nn.Module | None:
    """The child with exactly three linear maps, two from d to m and one back, under their usual names."""
    for child in layer.children():
        linear = {name: m for name, m in ((name, bare(m)) for name, m in child.named_children()) if isinstance(m, nn.Linear)}
        if set(linear) == set(MATRICES):
            gate, up, down = (linear[name] for name in MATRICES)
            if gate.weight.shape == up.weight.shape == down.weight.T.shape:
                return child
    return None


def _find_attention(layer: nn.Module, mlp: nn.Module) -> nn.Module:
    """The other child with linear maps in it."""
    found = [c for c in layer.children() if c is not mlp and any(isinstance(m, nn.Linear) for m in c.modules())]
    if len(found) != 1:
        raise UserError(
            f"model layer {type(layer).__name__}: {len(found)} parts with linear maps beside the MLP; expected one, the attention"
        )
    return found[0]


class _LayerSeen(Exception):  # noqa: N818 (not an error)
    """Ends the forward pass once the first layer has run."""


def _norm_behind_mlp(model: nn.Module, backbone: nn.Module, layer: nn.Module, mlp: nn.Module) -> str | None:
    """Name of the layer's child that takes the MLP's output, seen by running one token through the layer."""
    names = {child: name for name, child in layer.named_children()}
    outputs: dict[str, Any] = {}

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        if module is mlp:
            outputs["mlp"] = output
        elif "mlp" in outputs and args and args[0] is outputs["mlp"]:
            outputs["behind"] = names[module]

    def stop(*_: Any) -> None:
        raise _LayerSeen

    handles = [child.register_forward_hook(watch) for child in names] + [layer.register_forward_hook(stop)]
    try:
        with torch.no_grad():
            backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
    except _LayerSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return outputs.get("behind")


def _final_norm(backbone: nn.Module, stack: nn.ModuleList) -> nn.Module:
    after = False
    for child in backbone.children():
        after = after or child is stack
        if after and getattr(getattr(child, "weight", None), "ndim", 0) == 1:
            return child
    raise UserError(f"model {type(backbone).__name__}: no norm behind its last layer")


def _head(model: nn.Module) -> nn.Linear:
    return model.get_output_embeddings()  # type: ignore[operator, no-any-return]


def _softcap(model: nn.Module) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[operator, union-attr]
