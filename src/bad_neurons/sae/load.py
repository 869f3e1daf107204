"""SAEs from a folder of ours, or pretrained ones by sae-lens' release and id.

Legend: d hidden size, F SAE width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from bad_neurons.artifacts import PathLike
from bad_neurons.errors import UserError


def layer_folder(folder: PathLike, layer: int) -> Path:
    """Folder of one layer's SAE below the folder of an SAE stage."""
    return Path(folder) / f"layer-{layer}"


def load_saes(source: str, layers: Iterable[int], d_in: int, device: str = "cpu") -> dict[int, Any]:
    """One ``sae_lens.SAE`` a layer.

    Args:
        source: a folder with ``layer-<number>`` folders, or ``release:id`` with ``{layer}`` in the id, such as
            ``gemma-scope-2b-pt-mlp-canonical:layer_{layer}/width_16k/canonical``.
        layers: which layers.
        d_in: hidden size that the model has.
        device: a torch device string.

    Raises:
        UserError: no SAE for a layer, unknown release, no network, or an SAE of another width.
    """
    saes = {layer: _load(source, layer, device) for layer in layers}
    for layer, sae in saes.items():
        if sae.cfg.d_in != d_in:
            raise UserError(
                f"SAE {source}: layer {layer} reads {sae.cfg.d_in} dimensions, but the model has {d_in}; give SAEs of this model"
            )
        trained_on = getattr(sae.cfg.metadata, "hook_layer", None)
        if isinstance(trained_on, int) and trained_on != layer:
            raise UserError(f"SAE {source}: the one given for layer {layer} was trained on layer {trained_on}")
        sae.eval().requires_grad_(False)
    return saes


class SAEs:
    """The SAEs of some layers, of which as many are in memory at a time as fit into a budget.

    Args:
        source: as for :func:`load_saes`; None gives no SAEs.
        layers: which layers.
        d_in: hidden size that the model has.
        device: a torch device string.
        budget: bytes that the SAEs may take; one is loaded whatever it takes.

    Attributes:
        turns: layers whose SAEs are loaded together, turn by turn; one turn where all fit.

    Raises:
        UserError: as :func:`load_saes`.
    """

    def __init__(self, source: str | None, layers: Iterable[int], d_in: int, device: str = "cpu", budget: float = float("inf")) -> None:
        self._source, self._d_in, self._device = source, d_in, device
        self._loaded: dict[int, Any] = {}
        ordered = sorted(layers) if source else []
        if ordered:
            first = self.load(ordered[:1])[ordered[0]]
            size = sum(t.numel() * t.element_size() for t in first.state_dict().values())
            together = int(max(1, min(len(ordered), budget // size)))
            self.turns = [ordered[i : i + together] for i in range(0, len(ordered), together)]
        else:
            self.turns = []

    def load(self, turn: Iterable[int]) -> dict[int, Any]:
        """The SAEs of the layers of one turn; those of other turns are let go."""
        turn = list(turn)
        kept = {layer: sae for layer, sae in self._loaded.items() if layer in turn}
        self._loaded = {}  # before the next ones come
        missing = [layer for layer in turn if layer not in kept]
        self._loaded = kept | (load_saes(str(self._source), missing, self._d_in, self._device) if missing else {})
        return self._loaded


def _load(source: str, layer: int, device: str) -> Any:
    from sae_lens import SAE

    if Path(source).is_dir():
        folder = layer_folder(source, layer)
        try:
            return SAE.load_from_disk(folder, device=device)
        except Exception as error:  # sae-lens lets through whatever its parsers raise
            there = sorted(p.name for p in Path(source).glob("layer-*"))
            raise UserError(
                f"SAE {folder}: cannot be loaded ({type(error).__name__}: {error}); the folder has {', '.join(there) or 'none'}"
            ) from error
    release, colon, sae_id = source.partition(":")
    if not colon or "{layer}" not in sae_id:
        raise UserError(
            f"SAE {source}: neither a folder here nor release:id with {{layer}} in the id, such as "
            "gemma-scope-2b-pt-mlp-canonical:layer_{layer}/width_16k/canonical"
        )
    try:
        return SAE.from_pretrained(release, sae_id.replace("{layer}", str(layer)), device=device)
    except Exception as error:
        raise UserError(f"SAE {source}: layer {layer}: unknown release or id, or no network ({type(error).__name__}: {error})") from error


def decoder_directions(sae: Any) -> Tensor:
    """What one unit of each feature adds to the reconstruction, [F, d], float32.

    That is ``W_dec``, except for SAEs whose activations already carry the norm of their decoder row.
    """
    W_dec: Tensor = sae.W_dec.detach().float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    return W_dec
