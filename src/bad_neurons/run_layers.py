"""The option ``layers`` of a run: numbers, a share of the model's layers, or a greedy choice.

``[4, 5, 6]`` names the layers. ``{first: 0.33}`` and ``{last: 0.5}`` take a share of them from below or from above, by the
model's configuration. ``{greedy: {budget: 6}}`` has a stage of its own choose them (``bad-neurons layers``, whose options
stand there); then they are known when that stage is done, and not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bad_neurons.artifacts import read_json
from bad_neurons.errors import UserError
from bad_neurons.formats import LAYERS
from bad_neurons.models.load import layer_count

_FORMS = "expected layers such as [4, 5, 6], {first: 0.33}, {last: 0.5} or {greedy: {budget: 6}}"

Side = Literal["first", "last"]


def check_layers(value: Any, where: str) -> None:
    """Refuse what is none of the forms; ``where`` names the file in the message.

    Raises:
        UserError: another form, a layer twice, or a share outside 0 to 1.
    """
    if isinstance(value, list):
        if not value or not all(type(layer) is int and layer >= 0 for layer in value) or len(set(value)) < len(value):
            raise UserError(f"{where}: layers {value}: one number or more from 0 on, each of them once")
    elif not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"first", "last", "greedy"}:
        raise UserError(f"{where}: layers {value}: {_FORMS}")
    elif "greedy" in value:
        if not isinstance(value["greedy"], dict | None):
            raise UserError(f"{where}: layers {value}: options of `bad-neurons layers` by name, such as {{greedy: {{budget: 6}}}}")
        if (features := (value["greedy"] or {}).get("features", "sae")) not in ("sae", "residual"):
            raise UserError(f"{where}: layers.greedy.features {features!r}: sae or residual")
    else:
        [(side, share)] = value.items()
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise UserError(f"{where}: layers.{side} {share!r}: a share of the model's layers above 0 and at most 1, such as 0.33")


@dataclass(frozen=True)
class LayerChoice:
    """What the option says, and what follows from it.

    Args:
        value: the option, as :func:`check_layers` lets it pass.
        model: whose layers they are; its configuration is read where their number matters.
        chosen: where the greedy choice writes ``layers.json``.
        pretrained: whether there are SAEs for all layers already.
        sae_layers: layers of which the run trains SAEs whatever is chosen, or None.
    """

    value: Any
    model: str
    chosen: Path
    pretrained: bool
    sae_layers: list[int] | None

    @property
    def greedy(self) -> dict[str, Any] | None:
        """Options of the greedy choice; None where there is none. It reads SAE features where there are SAEs before it."""
        if not isinstance(self.value, dict) or "greedy" not in self.value:
            return None
        options = self.value["greedy"] or {}
        covered = self.sae_layers is not None and set(options.get("candidates") or self.sae_layers) <= set(self.sae_layers)
        return {"features": "sae" if self.pretrained or covered else "residual", **options}

    @property
    def on_sae(self) -> bool:
        """Whether the greedy choice reads SAE features, so that SAEs come before it."""
        return (self.greedy or {}).get("features") == "sae"

    @property
    def candidates(self) -> list[int]:
        """Layers that the greedy choice is made from."""
        return (self.greedy or {}).get("candidates") or self.sae_layers or list(range(layer_count(self.model)))

    @property
    def layers(self) -> list[int]:
        """The layers of the probe, from the lowest up where they are not a list.

        Raises:
            UserError: the greedy choice is not there yet or took no layer, or the model is not found.
        """
        if isinstance(self.value, list):
            return self.value
        if self.greedy is None:
            [(side, share)] = self.value.items()
            return share_of_layers(layer_count(self.model), side, share)
        layers: list[int] = read_json(self.chosen, LAYERS)["chosen"]
        if not layers:
            raise UserError(f"{self.chosen}: no layer tells the answers apart better than none does; name some: `layers: [4, 5, 6]`")
        return layers


def share_of_layers(count: int, side: Side, share: float) -> list[int]:
    """The lowest or the highest ``share`` of ``count`` layers, rounded to whole ones, one at least."""
    taken = max(1, round(share * count))
    return list(range(taken)) if side == "first" else list(range(count - taken, count))
