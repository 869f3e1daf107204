"""KL and perplexity against transformers, one text at a time."""

from __future__ import annotations

import math

import pytest
import torch

from bad_neurons.errors import RunError
from bad_neurons.evaluation import side_effects as side_effects_module
from bad_neurons.evaluation.side_effects import CleanStates, side_effects
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.edits import NeuronDelta

TEXTS = [
    "Rain fell on the roof all night.",
    "Tea",
    "A rather longer sentence, with commas, and with more to say than the others.",
    "",
    "Bricks.",
]


@pytest.fixture
def edited(tiny, choose):
    """``edited(family, size)``: a model with a random delta of that size on it."""

    def made(family, size):
        lm = tiny(family)
        view = view_decoder(lm.model)
        delta = NeuronDelta(view, choose(lm, "intermediate"))
        delta.restore({name: size * torch.randn_like(value) for name, value in delta.deltas().items()})
        return lm, view, delta

    return made


def one_by_one(lm, delta, limit=256):
    """Tokens, KL in nats a token, and both perplexities from transformers' own logits in float64."""
    count, kl, before, after = 0, 0.0, 0.0, 0.0
    for text in TEXTS:
        ids = torch.tensor([[2, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]][:limit]])
        if ids.shape[1] > 1:
            with torch.no_grad(), delta.disabled():
                p0 = lm.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with torch.no_grad():
                p = lm.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            targets = ids[0, 1:, None]
            count += len(targets)
            kl += float((p0.exp() * (p0 - p)).sum())
            before -= float(p0.gather(1, targets).sum())
            after -= float(p.gather(1, targets).sum())
    expected = {"kl_per_token": kl / count, "perplexity_before": math.exp(before / count), "perplexity_after": math.exp(after / count)}
    return {"tokens": count, **expected}


def test_batches_equal_single_texts(edited, family, monkeypatch):
    monkeypatch.setattr(side_effects_module, "ROWS", 7)
    lm, view, delta = edited(family, 1.0)
    expected = one_by_one(lm, delta)
    assert expected["tokens"] == sum(len(text) for text in TEXTS)  # one token a byte behind BOS
    assert expected["kl_per_token"] > 1e-3
    assert side_effects(view, lm.tokenizer, TEXTS, delta, max_tokens=100) == pytest.approx(expected, rel=1e-4)


def test_long_texts_are_cut(edited):
    lm, view, delta = edited("gemma2", 1.0)
    found = side_effects(view, lm.tokenizer, TEXTS, delta, max_length=9)
    assert found["tokens"] == 8 + 3 + 8 + 7
    assert found == pytest.approx(one_by_one(lm, delta, 9), rel=1e-4)


def test_a_zero_delta_costs_nothing(edited):
    lm, view, delta = edited("gemma2", 0.0)
    found = side_effects(view, lm.tokenizer, TEXTS, delta)
    assert found["kl_per_token"] == 0.0
    assert found["perplexity_after"] == found["perplexity_before"]


def test_without_an_edit_there_is_only_before(edited):
    lm, view, delta = edited("gemma2", 1.0)
    expected = one_by_one(lm, delta)
    with delta.disabled():
        found = side_effects(view, lm.tokenizer, TEXTS)
    assert found == pytest.approx({"tokens": expected["tokens"], "perplexity_before": expected["perplexity_before"]}, rel=1e-4)


@pytest.mark.parametrize("first", ["edited", "clean"])
def test_clean_states_are_kept_between_calls(edited, family, first, monkeypatch):
    """Two edits of one model: with the states of the first call the second runs one side, to the same numbers bit for bit."""
    lm, view, delta = edited(family, 1.0)
    kept, whole = CleanStates(), []
    options = {"max_length": 20, "max_tokens": 64}
    original = side_effects_module.before_and_after
    monkeypatch.setattr(side_effects_module, "before_and_after", lambda *a: whole.append(a[3]) or original(*a))
    if first == "edited":
        assert side_effects(view, lm.tokenizer, TEXTS, delta, **options, clean=kept)["kl_per_token"] > 1e-3
    else:
        with delta.disabled():
            assert "kl_per_token" not in side_effects(view, lm.tokenizer, TEXTS, **options, clean=kept)
    batches = len(whole)
    assert batches == len(kept.final) > 1

    delta.restore({name: 0.5 * value for name, value in delta.deltas().items()})
    found = side_effects(view, lm.tokenizer, TEXTS, delta, **options, clean=kept)
    assert len(whole) == batches
    assert found == side_effects(view, lm.tokenizer, TEXTS, delta, **options)
    assert len(whole) == 2 * batches
    side_effects(view, lm.tokenizer, TEXTS[:1], delta, **options, clean=kept)  # other texts are read anew
    assert len(whole) == 2 * batches + 1


@pytest.mark.parametrize(("size", "said"), [(float("nan"), "KL and log-likelihood on unrelated text: .*NaN"), (1e30, "NaN|nats per token")])
def test_a_destroyed_model_is_one_line(edited, size, said):
    lm, view, delta = edited("llama", size)
    with pytest.raises(RunError, match=said):
        side_effects(view, lm.tokenizer, TEXTS, delta)


def test_perplexity_beyond_every_number():
    assert side_effects_module._perplexity(700.0) == math.exp(700.0)
    with pytest.raises(RunError, match="side effects: 712 nats per token"):
        side_effects_module._perplexity(712.0)


@pytest.mark.parametrize("size", [0.5, 0.0])
def test_kl_over_sequences_is_that_over_texts(edited, size):
    lm, view, delta = edited("gemma2", size)
    sequences = [ids for text in TEXTS if len(ids := lm.tokenizer(text)["input_ids"]) > 1]
    expected = side_effects(view, lm.tokenizer, TEXTS, delta)["kl_per_token"]
    clean = CleanStates()
    for _ in range(2):  # the second time from kept states
        assert side_effects_module.text_kl(view, sequences, delta, clean) == pytest.approx(expected, abs=1e-6)
    assert (expected > 1e-3) is bool(size)
