"""LoRA against peft's own model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bad_neurons.errors import UserError
from bad_neurons.models.view import MATRICES, view_decoder
from bad_neurons.tuning.lora import ALL_MAPS, LoraEdit, lora_rank


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers by an old name
@pytest.mark.parametrize("matrices", [MATRICES, ALL_MAPS])
def test_the_same_function_and_gradient_as_peft(tiny, family, matrices, ids):
    lm = tiny(family)
    edit = LoraEdit(view_decoder(lm.model), [1, 3], 3, matrices)
    torch.manual_seed(4)
    edit.restore({name: 0.3 * torch.randn_like(value) for name, value in edit.deltas().items()})
    where = rf"model\.layers\.[13]\.(mlp|self_attn)\.({'|'.join(matrices)})"
    theirs = get_peft_model(tiny(family).model, LoraConfig(r=3, lora_alpha=3, target_modules=where, task_type="CAUSAL_LM"))
    weights = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(weights) == len(edit.deltas()) == 2 * 2 * len(matrices)
    named = {
        name: next(key for key in weights if f"layers.{layer}." in key and f".{matrix}.lora_{side}." in key)
        for name in edit.deltas()
        for _, layer, matrix, side in [name.split(".")]
    }
    with torch.no_grad():
        for name, value in edit.deltas().items():
            weights[named[name]].copy_(value)
    clean = logits(tiny(family).model, ids)
    assert (logits(lm.model, ids) - clean).abs().max() > 0.02
    assert torch.equal(logits(lm.model, ids), logits(theirs, ids))
    for model in (lm.model, theirs):
        model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    for name, parameter in zip(edit.deltas(), edit.trainable(), strict=True):
        assert torch.equal(parameter.grad, weights[named[name]].grad)


def test_rank_from_a_number_of_parameters(tiny):
    view = view_decoder(tiny().model)
    one = 2 * 3 * (16 + 24)  # two layers, three maps
    assert [lora_rank(view, [0, 2], n) for n in (1, one, 2 * one, 2 * one + 119, 2 * one + 121, 10 * one)] == [1, 1, 2, 2, 3, 10]
    assert lora_rank(view, [1], 100, ["q_proj", "k_proj"]) == round(100 / (32 + 24))
    edit = LoraEdit(view, [0, 2], 2)
    assert sum(p.numel() for p in edit.trainable()) == 2 * one


def test_the_seed_decides_alone(tiny):
    def start(seed):
        state = torch.random.get_rng_state()
        edit = LoraEdit(view_decoder(tiny().model), [1], 2, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return edit.deltas()

    first, same, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.1.up_proj.A"], other["layers.1.up_proj.A"])
    assert {name: bool(value.any()) for name, value in first.items()} == {name: name.endswith("A") for name in first}


def test_the_model_can_still_be_looked_at(tiny):
    lm = tiny()
    before = view_decoder(lm.model)
    maps = [part.matrix(name) for part in before.layers for name in ALL_MAPS]
    LoraEdit(before, [1, 3], 2, ALL_MAPS)
    for view in (before, view_decoder(lm.model)):
        assert [part.matrix(name) for part in view.layers for name in ALL_MAPS] == maps


def test_what_is_refused(tiny):
    view = view_decoder(tiny().model)
    with pytest.raises(UserError, match=r"layers of LoRA: \[4\]: this model has layers 0 to 3"):
        LoraEdit(view, [4], 2)
    with pytest.raises(UserError, match="rank of LoRA 0: at least 1"):
        LoraEdit(view, [1], 0)
    with pytest.raises(UserError, match="has no qkv_proj"):
        LoraEdit(view, [1], 2, ["qkv_proj"])
    assert not any("lora" in name for name, _ in view.model.named_parameters())
