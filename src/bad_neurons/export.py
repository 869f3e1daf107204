"""The export stage: a delta merged into an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bad_neurons.artifacts import digest_path, written_aside
from bad_neurons.errors import UserError
from bad_neurons.models.load import load_model
from bad_neurons.selection.neurons import NeuronSelection
from bad_neurons.tuning.delta_file import merge_delta


def export(model: str, delta: str, out: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32", overwrite: bool = False) -> Path:
    """Merge a delta into the weights and save a folder that ``AutoModelForCausalLM.from_pretrained`` loads without this package.

    Args:
        model: the base model: ``packaged:<name>``, a folder, or a hub id.
        delta: ``delta.safetensors`` of a tuning stage.
        out: folder to write; must not exist yet.
        dtype: dtype of the saved weights; the merge itself is done in float32. bfloat16 is half as large and rounds
            small changes away.
        overwrite: replace a folder that is already there.

    Raises:
        UserError: the folder exists, or the delta belongs to another model.
    """
    import torch

    folder = Path(out)
    if folder.exists() and not overwrite:
        raise UserError(f"--out {out}: already there; give another folder or --overwrite true")
    lm = load_model(model, "float32")
    selection = merge_delta(lm.model, delta)
    with written_aside(folder) as aside:
        lm.model.to(getattr(torch, dtype)).save_pretrained(aside)  # type: ignore[call-overload]
        lm.tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(_model_card(model, delta, selection, dtype), encoding="utf-8")
    return folder


def _model_card(model: str, delta: str, selection: NeuronSelection, dtype: str) -> str:
    kind = "attention heads" if selection.axis == "heads" else "neurons"
    owners = "attention heads" if selection.axis == "heads" else "MLP neurons"
    rows = "\n".join(f"| {layer} | {len(indices)} |" for layer, indices in selection.layers.items())
    return f"""---
base_model: {model.removeprefix("packaged:")}
library_name: transformers
tags: [bad-neurons]
---

# {model}, {selection.count} {kind} retrained

Made by [bad-neurons](https://arxiv.org/abs/2601.18939): of the base model's {owners}, {selection.count}
({100 * selection.share:.2f} % of the {len(selection.candidates)} layers searched; axis `{selection.axis}`, rule
`{selection.rule.get("name")}`, amount {selection.rule.get("amount")}) were retrained against an unwanted behaviour, and merged into the
weights. Everything else is the base model's, bit for bit up to the saved dtype ({dtype}).

| layer | {kind} changed |
| --- | --- |
{rows}

- Delta: SHA-256 `{digest_path(delta)}`
- Base model weights: fingerprint `{selection.model_digest}`

The licence of the base model applies to this one.
"""
