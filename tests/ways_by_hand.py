"""Records, texts and the numbers of a way by transformers' own model, one sequence at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bad_neurons.data.records import Record
from bad_neurons.models.load import LanguageModel
from bad_neurons.models.prompts import tokenize, tokenize_text
from bad_neurons.selection.ways.fisher import TEXT_TOKENS

LAYERS = [1, 3]
MATRICES = ("gate_proj", "up_proj", "down_proj")
UNITS = {"residual": 16, "intermediate": 24, "heads": 2}


def said(text: str) -> tuple[dict[str, str], ...]:
    """One turn of a person."""
    return ({"role": "user", "content": text},)


# Positions that begin alike, of other lengths, and one question that two people ask.
NEUTRAL = said("Is it?")
RECORDS = [
    Record(said("I like red. Is it?"), "No", "a", "t", "Yes", neutral_prompt=NEUTRAL, choices=("It is red", "It is blue")),
    Record(said("Blue! Is it?"), "No", "a", "t", "Yes", neutral_prompt=NEUTRAL, choices=("It is blue", "It is green")),
    Record(said("Up, right?"), "Down it is.", "b", "t", "Up"),
]
TEXTS = ["Some words about nothing.", "Other words.", "A third one, of another length"]


def trainable(lm: LanguageModel) -> dict[tuple[int, str], nn.Parameter]:
    """Weights of the candidate layers of which some unit owns a part, by layer and matrix, with gradients from now on."""
    named = dict(lm.model.named_parameters())
    found = {
        (layer, matrix): next(p for name, p in named.items() if name.endswith(f"layers.{layer}.{block}.{matrix}.weight"))
        for layer in LAYERS
        for block, matrices in (("mlp", MATRICES), ("self_attn", ("q_proj", "o_proj")))
        for matrix in matrices
    }
    for p in found.values():
        p.requires_grad_(True)
    return found


def answer_log_probs(lm: LanguageModel, turns: Any, answer: str) -> Tensor:
    """Log-probabilities [answer tokens, V] at the places that predict an answer's tokens, by an ordinary forward pass."""
    ids = tokenize(lm.tokenizer, turns, answer)
    logits = lm.model(input_ids=torch.tensor([ids.prompt + ids.answer])).logits[0]
    return logits[len(ids.prompt) - 1 : -1].log_softmax(-1)


def log_prob(lm: LanguageModel, turns: Any, answer: str) -> Tensor:
    """Log-probability of an answer."""
    ids = torch.tensor(tokenize(lm.tokenizer, turns, answer).answer)
    return answer_log_probs(lm, turns, answer).gather(1, ids[:, None]).sum()


def owned(values: dict[tuple[int, str], Tensor], axis: str, layer: int, unit: int) -> Tensor:
    """What a unit owns of the values [out, in] of a layer's matrices, side by side (DESIGN step 5; heads have 8 rows each)."""
    if axis == "heads":
        span = slice(8 * unit, 8 * unit + 8)
        parts = [values[layer, "q_proj"][span], values[layer, "o_proj"][:, span]]
    else:
        gate, up, down = (values[layer, matrix] for matrix in MATRICES)
        parts = [gate[:, unit], up[:, unit], down[unit]] if axis == "residual" else [gate[unit], up[unit], down[:, unit]]
    return torch.cat([part.flatten() for part in parts])


def untouched(lm: LanguageModel) -> bool:
    """Whether a model has no hook, no gradient and nothing that asks for one."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in lm.model.modules())
    return not hooks and all(p.grad is None and not p.requires_grad for p in lm.model.parameters())


def drawn_texts(lm: LanguageModel, seed: int = 0) -> list[tuple[list[int], Tensor]]:
    """Token ids of each text, longest first as they are batched, and the tokens that the model draws behind all but the last."""
    sequences = sorted((tokenize_text(lm.tokenizer, text)[:TEXT_TOKENS] for text in TEXTS), key=len, reverse=True)
    u = torch.rand(sum(len(ids) - 1 for ids in sequences), generator=torch.Generator().manual_seed(seed)).double()
    start = 0
    found: list[tuple[list[int], Tensor]] = []
    for ids in sequences:
        with torch.no_grad():
            held = lm.model(input_ids=torch.tensor([ids])).logits[0, :-1].double().softmax(-1).cumsum(-1)
        found.append((ids, torch.searchsorted(held, u[start : start + len(held), None], right=True).squeeze(1)))
        start += len(held)
    return found


def drawn_log_prob(lm: LanguageModel, ids: list[int], drawn: Tensor) -> Tensor:
    """Summed log-probability of the drawn tokens."""
    return lm.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, drawn[:, None]).sum()
