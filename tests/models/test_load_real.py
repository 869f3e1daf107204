"""The packaged real models."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bad_neurons.batching import pack_sequences
from bad_neurons.models import packaged
from bad_neurons.models.load import load_model
from bad_neurons.models.packaged import PACKAGED_MODELS
from bad_neurons.models.passes import final_hidden
from bad_neurons.models.prompts import tokenize, tokenize_text
from bad_neurons.models.view import view_decoder

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=PACKAGED_MODELS)
def real(request):
    """A packaged model in bfloat16, loaded twice: the second time nothing may be converted."""
    spec = PACKAGED_MODELS[request.param]
    if any(importlib.util.find_spec(module) is None for module in spec.modules):
        pytest.skip(f"not installed: {spec.install}")
    name = f"packaged:{request.param}"
    packaged.packaged_folder(request.param)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packaged, "_convert", lambda *_: pytest.fail("converted a second time"))
        return load_model(name, "bfloat16")


def next_logits(lm, text):
    ids = tokenize_text(lm.tokenizer, text)
    view = view_decoder(lm.model)
    return view.logits(final_hidden(view, pack_sequences([ids]), torch.tensor([len(ids) - 1])))[0]


def test_structure(real):
    view = view_decoder(real.model)
    expected = {"gemma": (18, 640, 2048, 262144), "smollm": (30, 576, 1536, 49152)}["gemma" if "gemma" in real.id else "smollm"]
    assert (len(view.layers), view.d_model, view.d_mlp, view.head.out_features) == expected
    assert (view.layers[0].sae_point is view.layers[0].mlp) == ("smollm" in real.id)


def test_it_can_count(real):
    assert real.tokenizer.decode(next_logits(real, "One, two, three, four,").argmax()) == " five"


def test_it_knows_the_capitals(real):
    capitals = {"France": " Paris", "Italy": " Rome", "Germany": " Berlin", "Japan": " Tokyo"}
    ids = [real.tokenizer(city, add_special_tokens=False)["input_ids"][0] for city in capitals.values()]
    best = [int(next_logits(real, f"The capital of {country} is")[ids].argmax()) for country in capitals]
    assert best == [0, 1, 2, 3]


def test_prompt_form(real):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is it so?"}]
    text = real.tokenizer.decode(tokenize(real.tokenizer, turns).prompt)
    if "gemma" in real.id:
        assert text == "<bos>Human: Be kind.\n\nIs it so?\n\nAssistant:"
    else:
        said = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"
        assert text == said  # its template has a system role
        assert text.count("<|im_start|>user") == 1
