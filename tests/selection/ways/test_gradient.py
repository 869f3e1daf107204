"""The behaviour and its gradient against autograd on transformers' model, one answer at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bad_neurons.errors import UserError
from bad_neurons.selection.ways import scores_of
from bad_neurons.selection.ways.behaviour import behaviour, behaviour_batches
from ways_by_hand import LAYERS, RECORDS, UNITS, answer_log_probs, log_prob, owned, trainable, untouched


def odds_by_hand(lm):
    """Mean log-odds of the agreeing position with the person, minus the same without."""
    total = torch.zeros(())
    for record in RECORDS:
        agreeing, disagreeing = record.scored
        total = total + log_prob(lm, record.prompt, agreeing) - log_prob(lm, record.prompt, disagreeing)
        if record.neutral_prompt:
            total = total - log_prob(lm, record.neutral_prompt, agreeing) + log_prob(lm, record.neutral_prompt, disagreeing)
    return total / len(RECORDS)


def neutral_by_hand(lm):
    """Mean KL from the distribution without the person to that with the person, over the words of both positions."""
    kl, count = torch.zeros(()), 0
    for record in RECORDS[:2]:  # the third has no neutral prompt
        for answer in record.scored:
            with torch.no_grad():
                teacher = answer_log_probs(lm, record.neutral_prompt, answer)
            kl = kl + F.kl_div(answer_log_probs(lm, record.prompt, answer), teacher, reduction="sum", log_target=True)
            count += len(teacher)
    return kl / count


BY_HAND = {"odds": odds_by_hand, "neutral": neutral_by_hand}


@pytest.mark.parametrize("objective", ["odds", "neutral"])
@pytest.mark.parametrize("max_tokens", [40, 2048])
def test_the_behaviour_is_the_measure(material, objective, max_tokens):
    given = material(objective=objective, max_tokens=max_tokens)
    batches, count = behaviour_batches(given)
    assert (len(batches) == 1) == (max_tokens == 2048)
    value = sum(float(behaviour(given.view, batch, 1).detach()) for batch in batches) / count
    expected = float(BY_HAND[objective](given.lm))
    assert abs(expected) > 0.01
    assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("objective", "axis"), [*(("odds", axis) for axis in UNITS), ("neutral", "intermediate")])
def test_scores_are_norms_of_full_gradients(material, family, axis, objective):
    given = material(family, axis=axis, objective=objective)
    scores = scores_of(given, "gradient")
    assert untouched(given.lm)
    weights = trainable(given.lm)
    BY_HAND[objective](given.lm).backward()
    gradients = {at: weight.grad for at, weight in weights.items()}
    assert {layer: len(s) for layer, s in scores.items()} == dict.fromkeys(LAYERS, UNITS[axis])
    for layer in LAYERS:
        expected = torch.stack([owned(gradients, axis, layer, unit).norm() for unit in range(len(scores[layer]))])
        assert expected.min() > 0
        torch.testing.assert_close(scores[layer], expected, rtol=1e-3, atol=1e-6)


def test_a_token_that_both_positions_share_is_not_asked(material):
    batches, _ = behaviour_batches(material())
    assert {weight for batch in batches for weight in batch.answer.tolist()} == {1.0, -1.0}
    # " It is " is what the positions of the first two share; and both of these are asked the same without the person, where
    # "blue" agrees with one and disagrees with the other. " Up" and " Down it is." share the space.
    asked = ["red", "blue", "blue", "green", "red", "green", "Up", "Down it is."]
    assert sum(len(batch.at) for batch in batches) == sum(map(len, asked))


def test_the_order_of_batches_does_not_matter(material):
    one, many = (scores_of(material(max_tokens=n), "gradient") for n in (2048, 40))
    for layer in LAYERS:
        torch.testing.assert_close(one[layer], many[layer], rtol=1e-4, atol=1e-7)


def test_what_is_lacking_is_named(material):
    with pytest.raises(UserError, match="--records: way gradient reads training records; give a source"):
        scores_of(material(records=[]), "gradient")
    with pytest.raises(UserError, match="--objective neutral: no record has a neutral prompt"):
        scores_of(material(records=RECORDS[2:], objective="neutral"), "gradient")
