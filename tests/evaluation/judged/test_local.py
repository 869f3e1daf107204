"""A local model as a judge, against transformers' own forward pass."""

from __future__ import annotations

import math

import pytest
import torch

from bad_neurons.evaluation.judged.local import LocalJudge, read
from bad_neurons.evaluation.judged.tests import Item, JudgeQuestion
from bad_neurons.models.load import load_model
from bad_neurons.testing import save_tiny_model


def log_probs(lm, text, scale):
    """Log-probability of each number of the scale behind a text, one forward pass each."""
    prompt, found = [2, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]], {}
    for score in scale:
        answer = lm.tokenizer(f" {score}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found[score] = float(logits.log_softmax(-1)[range(len(answer)), answer].sum())
    return found


def ask(judge, questions):
    found = {}
    judge.ask(questions, found.__setitem__)
    return [found[number] for number in range(len(questions))]


@pytest.fixture
def questions():
    """On both scales, of several lengths."""
    rows = [{"statement": f"The moon told me {number}{' again' * number}."} for number in range(4)]
    return [Item(test, "", "self", row).asked_of_judge("Go on.") for row in rows for test in ("whosaid", "delusion")]


def test_scores_are_those_of_a_forward_pass(tiny, family, questions, monkeypatch):
    monkeypatch.setattr(LocalJudge, "together", 3)
    lm = tiny(family)
    expected, likeliest = (ask(LocalJudge(lm, reading), questions) for reading in ("expected", "likeliest"))
    for number in (0, 1, 5, 7):
        system, user = (turn["content"] for turn in questions[number].turns)
        scale = range(questions[number].low, questions[number].high + 1)
        by_hand = log_probs(lm, f"Human: {system}\n\n{user}\n\nAssistant: Score:", scale)
        weights = {score: math.exp(value) for score, value in by_hand.items()}
        mean = sum(score * weight for score, weight in weights.items()) / sum(weights.values())
        assert expected[number].score == pytest.approx(mean, abs=2e-4)
        assert likeliest[number].score == max(weights, key=weights.__getitem__)
    assert len({verdict.score for verdict in expected}) == len(questions)


def test_reading_by_hand():
    log_thirds = {0: math.log(0.5), 1: math.log(0.25), 2: math.log(0.25)}
    assert read(log_thirds, "expected").score == pytest.approx(0.75)
    assert read(log_thirds, "likeliest").score == 0
    assert read(log_thirds, "expected").reply == "0: 0.5000, 1: 0.2500, 2: 0.2500"
    assert read({-1: -2000.0, 0: -2000.0}, "expected").score == -0.5  # tiny, and still compared
    assert read({0: math.nan, 1: 0.0}, "expected").score is None
    assert read({0: -math.inf, 1: -math.inf}, "likeliest").score is None


def test_key_tells_models_and_readings_apart(tiny):
    lm = tiny()
    keys = {LocalJudge(lm).key, LocalJudge(lm, "likeliest").key, LocalJudge(tiny(seed=1)).key}
    assert len(keys) == 3
    assert LocalJudge(tiny()).key in keys
    assert LocalJudge(lm).name == f"{lm.id} (expected)"


def test_a_chat_model_is_asked_in_its_own_form(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    lm = load_model(save_tiny_model(tmp_path / "chat", "llama", chat_template=template), "float32")
    turns = ({"role": "system", "content": "Grade."}, {"role": "user", "content": "Well?"})
    verdict = ask(LocalJudge(lm), [JudgeQuestion(turns, 0, 1)])[0]
    odds = log_probs(lm, "[system]Grade.[user]Well?[assistant]Score:", (0, 1))
    assert verdict.score == pytest.approx(1 / (1 + math.exp(odds[0] - odds[1])), abs=2e-4)
