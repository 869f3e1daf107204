"""The parts of a decoder, found by structure."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from bad_neurons.batching import pack_sequences
from bad_neurons.errors import UserError
from bad_neurons.models.passes import visit_mlp_outputs
from bad_neurons.models.view import view_decoder
from bad_neurons.testing import tiny_model

# By hand: the module whose output the attention adds to the residual stream, and the one of the MLP.
ADDED = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "llama": ("self_attn", "mlp"),
    "qwen2": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "mistral": ("self_attn", "mlp"),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def watch_layers(model, attention, ids):
    """Input, attention part and output of each layer, seen by hooks of this test alone, and transformers' hidden states."""
    seen = {"in": [], "attention": [], "out": []}
    handles = []
    for layer in model.model.layers:
        handles.append(layer.register_forward_pre_hook(lambda _m, args: seen["in"].append(args[0])))
        handles.append(layer.register_forward_hook(lambda _m, _a, output: seen["out"].append(first(output))))
        handles.append(getattr(layer, attention).register_forward_hook(lambda _m, _a, output: seen["attention"].append(first(output))))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return seen, states


def test_sizes(family):
    view = view_decoder(tiny_model(family))
    assert (len(view.layers), view.d_model, view.d_mlp) == (4, 16, 24)
    assert view.softcap == (5.0 if family == "gemma2" else None)
    assert [part.layer for part in view.layers] == list(view.model.model.layers)
    assert (view.backbone, view.final_norm, view.head) == (view.model.model, view.model.model.norm, view.model.lm_head)
    for part in view.layers:
        assert [tuple(part.matrix(name).weight.shape) for name in ("gate_proj", "up_proj", "down_proj")] == [(24, 16), (24, 16), (16, 24)]
        assert [part.matrix(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")] == [
            getattr(part.layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ]
    assert view.head_dim == 8


def test_sae_point_is_where_the_mlp_enters_the_residual_stream(family):
    view = view_decoder(tiny_model(family))
    assert [part.sae_point for part in view.layers] == [getattr(part.layer, ADDED[family][1]) for part in view.layers]


def test_what_is_recorded_is_exactly_what_is_added(family, ids):
    model = tiny_model(family)
    seen, states = watch_layers(model, ADDED[family][0], ids)
    recorded = {}
    visit_mlp_outputs(view_decoder(model), pack_sequences(ids.tolist()), range(4), recorded.__setitem__)
    assert sorted(recorded) == [0, 1, 2, 3]
    for layer in range(4):
        assert torch.equal(seen["in"][layer], states[layer])
        assert not torch.equal(seen["in"][layer] + seen["attention"][layer], seen["out"][layer])
        assert torch.equal(seen["in"][layer] + seen["attention"][layer] + recorded[layer], seen["out"][layer])
    assert torch.equal(states[2] - states[1] - seen["attention"][1], seen["out"][1] - seen["in"][1] - seen["attention"][1])


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_bare_mlp_output_of_gemma_is_something_else(family, ids):
    model, kept = tiny_model(family), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: kept.append(output))
    visit_mlp_outputs(view_decoder(model), pack_sequences(ids.tolist()), [1], lambda _, output: kept.append(output))
    handle.remove()
    assert (kept[0] - kept[1]).abs().max() > 0.1


def test_gain(family):
    view = view_decoder(tiny_model(family))
    for part in view.layers:
        expected = 1 + part.layer.post_feedforward_layernorm.weight.detach() if family.startswith("gemma") else torch.ones(16)
        assert part.gain().dtype == torch.float32
        torch.testing.assert_close(part.gain(), expected, rtol=1e-6, atol=1e-6)


def test_gain_where_a_post_norm_stores_the_gain_itself():
    # no supported family does so, but the gain must not be taken for Gemma's 1 + weight
    view = view_decoder(tiny_model("gemma2"))
    norm = nn.RMSNorm(16, eps=1e-6)
    norm.weight.data = torch.linspace(-2, 3, 16)
    part = dataclasses.replace(view.layers[0], sae_point=norm)
    torch.testing.assert_close(part.gain(), torch.linspace(-2, 3, 16), rtol=1e-6, atol=1e-6)


def test_gpt2_is_refused_by_name():
    with pytest.raises(UserError, match=r"GPT2LMHeadModel: no gated MLP \(gate_proj, up_proj, down_proj\)"):
        view_decoder(tiny_model("gpt2"))


def test_a_layer_without_gated_mlp_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].mlp = nn.Linear(16, 16)
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        view_decoder(model)


def test_looking_leaves_no_hooks(family):
    model = tiny_model(family)
    view_decoder(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layer_numbers_are_checked():
    view = view_decoder(tiny_model("llama"))
    view.check_layers([0, 3], "--layers")
    for wrong, said in (([4], r"\[4\]"), ([0, -1], r"\[-1\]"), ([], "empty")):
        with pytest.raises(UserError, match=rf"--layers: {said}: this model has layers 0 to 3"):
            view.check_layers(wrong, "--layers")


def test_gemma3_inside_a_multimodal_wrapper(ids):
    text = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}  # fmt: skip
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)).eval()
    view = view_decoder(model)
    assert [part.layer for part in view.layers] == list(model.model.language_model.layers)
    assert (view.d_model, view.d_mlp, view.softcap) == (16, 24, None)
    assert view.layers[1].sae_point is model.model.language_model.layers[1].post_feedforward_layernorm
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(view.logits(view.backbone(input_ids=ids).last_hidden_state), logits)
