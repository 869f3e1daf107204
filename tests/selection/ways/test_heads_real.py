"""On a real model, first-order effects of heads are about those of heads that are really replaced."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bad_neurons.data.readers import load_records
from bad_neurons.models.load import load_model
from bad_neurons.models.packaged import PACKAGED_MODELS
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import view_decoder
from bad_neurons.selection.ways.heads import head_effects

pytestmark = pytest.mark.real
LAYERS = [20]


def log_prob(model, ids):
    log_p = model(input_ids=torch.tensor([ids.prompt + ids.answer])).logits.log_softmax(-1)[0]
    return sum(log_p[len(ids.prompt) - 1 + i, token] for i, token in enumerate(ids.answer)).item()


@torch.no_grad()
def replaced_effects(lm, record):
    """What the log-odds lose when one of the 9 heads of a layer hands on what it does without the person, [layers, 9]."""
    effects, seen = torch.zeros(len(LAYERS), 9), {}
    maps = {layer: view_decoder(lm.model).layers[layer].attention.o_proj for layer in LAYERS}
    for answer, sign in zip(record.scored, (1, -1), strict=True):
        person, neutral = (tokenize(lm.tokenizer, prompt, answer) for prompt in (record.prompt, record.neutral_prompt))
        here, there = (slice(len(ids.prompt) - 1, len(ids.prompt) + len(ids.answer) - 1) for ids in (person, neutral))
        watch = [m.register_forward_pre_hook(lambda _m, args, layer=layer: seen.update({layer: args[0]})) for layer, m in maps.items()]
        log_prob(lm.model, neutral)
        for handle in watch:
            handle.remove()
        before = log_prob(lm.model, person)
        for row, layer in enumerate(LAYERS):
            for head in range(9):

                def replace(_module, args, layer=layer, own=slice(head * 64, head * 64 + 64), here=here, there=there):
                    z = args[0].clone()
                    z[0, here, own] = seen[layer][0, there, own]
                    return (z,)

                handle = maps[layer].register_forward_pre_hook(replace)
                effects[row, head] += sign * (before - log_prob(lm.model, person))
                handle.remove()
    return effects


def test_effects_are_about_those_of_replaced_heads():
    spec = PACKAGED_MODELS["smollm2-135m-instruct"]
    if any(importlib.util.find_spec(module) is None for module in spec.modules):
        pytest.skip(f"not installed: {spec.install}")
    lm = load_model("packaged:smollm2-135m-instruct", "float32")
    record = next(r for r in load_records("embedded") if r.neutral_prompt)
    found = head_effects(view_decoder(lm.model), lm.tokenizer, [record], LAYERS)
    found, expected = torch.stack([found[layer] for layer in LAYERS]).flatten(), replaced_effects(lm, record).flatten()
    assert expected.abs().max() > 0.05
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.95
    assert found.abs().argmax() == expected.abs().argmax()
