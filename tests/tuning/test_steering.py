"""Steering, against hooks of this test alone on transformers' model."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.data.records import Record
from bad_neurons.errors import UserError
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.steering import Steering, steering_vectors


def turn(text):
    return ({"role": "user", "content": text},)


RECORDS = [
    Record(turn("I say it is red. Is it?"), "No, it is blue", "a", "test", sycophantic="It is red", choices=("red", "blue")),
    Record(turn("Is nine odd? I doubt it."), "yes, it is", "b", "test", sycophantic="yes, no"),  # answers that begin alike
]
RIGHT = Record(turn("Ten is even, I think"), "yes", "c", "test", contrarian="no", person_is_right=True)


def by_hand(model, tokenizer, layers):
    """Mean over records of disagreeing minus agreeing, each the mean of the hidden states behind a layer over the answer's tokens."""
    sums = {layer: torch.zeros(16) for layer in layers}
    for record in RECORDS:
        for answer, sign in zip(record.scored, (-1, 1), strict=True):
            ids = tokenize(tokenizer, record.prompt, answer)
            with torch.no_grad():
                states = model(input_ids=torch.tensor([ids.prompt + ids.answer]), output_hidden_states=True).hidden_states
            for layer in layers:
                sums[layer] += sign * states[layer + 1][0, -len(ids.answer) :].mean(0)
    return {layer: total / len(RECORDS) for layer, total in sums.items()}


@pytest.mark.parametrize("max_tokens", [1, 2048])
def test_vectors(tiny, family, max_tokens):
    lm = tiny(family)
    found = steering_vectors(view_decoder(lm.model), lm.tokenizer, [*RECORDS, RIGHT], [2, 0], max_tokens)
    expected = by_hand(lm.model, lm.tokenizer, [0, 2])
    assert sorted(found) == [0, 2]
    for layer, value in expected.items():
        assert value.abs().max() > 0.1
        torch.testing.assert_close(found[layer], value, rtol=1e-4, atol=1e-4)


def test_the_function(tiny, family, ids):
    vectors = {1: torch.linspace(-1, 1, 16), 3: torch.linspace(0, 0.5, 16)}
    theirs, lm = tiny(family).model, tiny(family)
    for layer, vector in vectors.items():
        theirs.model.layers[layer].register_forward_hook(lambda _m, _a, output, vector=vector: output - 1.5 * vector)
    edit = Steering(view_decoder(lm.model), vectors)
    with torch.no_grad(), edit.scaled(-1.5):
        torch.testing.assert_close(lm.model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert {name: value.tolist() for name, value in edit.deltas().items()} == {
        f"layers.{layer}.residual": vector.tolist() for layer, vector in vectors.items()
    }


def test_what_is_refused(tiny):
    lm = tiny()
    view = view_decoder(lm.model)
    with pytest.raises(UserError, match="steering: the person is right in every record"):
        steering_vectors(view, lm.tokenizer, [RIGHT], [1])
    with pytest.raises(UserError, match=r"layers of steering: \[7\]"):
        steering_vectors(view, lm.tokenizer, RECORDS, [7])
    with pytest.raises(UserError, match=r"layers of steering: \[4\]"):
        Steering(view, {4: torch.zeros(16)})
