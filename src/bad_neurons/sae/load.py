"""SAEs from a folder of ours, or pretrained ones by sae-lens' release and id.

Legend: d hidden size, F SAE width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bad_neurons import formats
from bad_neurons.artifacts import PathLike, digest_path, read_json
from bad_neurons.errors import UserError

SEAL = "seal.json"


def layer_folder(folder: PathLike, layer: int) -> Path:
    """Folder of one layer's SAE below the folder of an SAE stage."""
    return Path(folder) / f"layer-{layer}"


def sae_digests(source: str | None, layers: Iterable[int]) -> dict[str, str]:
    """Digest of each layer's SAE in a folder, by layer as text; empty for published SAEs, which their name identifies."""
    return {str(layer): digest_path(layer_folder(source, layer)) for layer in layers} if source and Path(source).is_dir() else {}


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
        _check(folder)
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


def _check(folder: Path) -> None:
    """Refuse an SAE that is not what was saved, or whose configuration asks for other sizes than its weights have.

    Raises:
        UserError: a file has changed since it was written, or sizes that do not fit: sae-lens would make room for them first.
    """
    if (folder / SEAL).is_file():
        for name, digest in read_json(folder / SEAL, formats.SAE)["files"].items():
            if digest_path(folder / name) != digest:
                raise UserError(f"SAE {folder}: {name} is damaged or changed since it was written; run `bad-neurons sae fit` again")
    if not (folder / "cfg.json").is_file() or not (folder / "sae_weights.safetensors").is_file():
        return  # sae-lens says what it misses
    cfg = read_json(folder / "cfg.json", "configuration of an SAE")
    try:
        with safe_open(folder / "sae_weights.safetensors", framework="pt") as weights:
            shape = weights.get_slice("W_dec").get_shape()
    except (OSError, SafetensorError) as error:
        raise UserError(f"SAE {folder}: its weights cannot be read ({error})") from error
    sizes = [cfg.get(name) for name in ("d_sae", "d_in")] if isinstance(cfg, dict) else cfg
    if sizes != shape:
        raise UserError(f"SAE {folder}: cfg.json says d_sae, d_in {sizes!r:.60}, but W_dec is {shape}; save it again with sae-lens")


def decoder_directions(sae: Any) -> Tensor:
    """What one unit of each feature adds to the reconstruction, [F, d], float32.

    That is ``W_dec``, except for SAEs whose activations already carry the norm of their decoder row.
    """
    W_dec: Tensor = sae.W_dec.detach().float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    return W_dec
