"""Log-probabilities against one transformers pass a request."""

from __future__ import annotations

import random

import pytest
import torch

from bad_neurons.evaluation import scoring
from bad_neurons.evaluation.scoring import Request, answer_log_probs
from bad_neurons.models import head
from bad_neurons.models.head import token_log_probs
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import view_decoder
from bad_neurons.testing import tiny_tokenizer
from bad_neurons.tuning.edits import NeuronDelta
from helpers import by_transformers

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["Why?", "Is it 7 or 9, and who says so? ((", "Blue #"]
ANSWERS = ["Yes.", "No.", "It depends on how long you look at it.", "x"]


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def requests():
    """Twelve requests of different lengths in mixed order."""
    made = [Request(user(prompt), answer) for prompt in PROMPTS for answer in ANSWERS]
    random.Random(2).shuffle(made)
    return made


def test_base_form_equals_one_pass_a_request(tiny, family, requests):
    lm = tiny(family)
    found = answer_log_probs(view_decoder(lm.model), lm.tokenizer, requests, max_tokens=200).before
    texts = [(f"Human: {r.turns[0]['content']}\n\nAssistant:", f" {r.answer}") for r in requests]
    assert found == pytest.approx([by_transformers(lm.model, lm.tokenizer, *text) for text in texts], rel=1e-4)
    assert len({round(score, 6) for score in found}) == 12
    assert all(score < 0 for score in found)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_chat_template_equals_one_pass_a_request(tiny, family, requests):
    lm, tokenizer = tiny(family), tiny_tokenizer(TEMPLATE)
    found = answer_log_probs(view_decoder(lm.model), tokenizer, requests).before
    texts = [(f"<user>{r.turns[0]['content']}<assistant>", r.answer) for r in requests]
    assert found == pytest.approx([by_transformers(lm.model, tokenizer, *text) for text in texts], rel=1e-4)


def test_an_answer_goes_on_behind_an_assistant_turn(tiny):
    turns = [*user("Well?"), {"role": "assistant", "content": "I believe the best answer is"}]
    for tokenizer, prompt in (
        (tiny_tokenizer(), "Human: Well?\n\nAssistant: I believe the best answer is"),
        (tiny_tokenizer(TEMPLATE), "<user>Well?|<assistant>I believe the best answer is"),
    ):
        lm = tiny()
        found = answer_log_probs(view_decoder(lm.model), tokenizer, [Request(turns, "(A)")]).before
        assert found == pytest.approx([by_transformers(lm.model, tokenizer, prompt, " (A)")], rel=1e-4)


def test_the_final_cap_is_in_the_scores(tiny, requests):
    lm = tiny("gemma2")
    assert lm.model.config.final_logit_softcapping == 5.0
    capped = answer_log_probs(view_decoder(lm.model), lm.tokenizer, requests).before
    lm.model.config.final_logit_softcapping = None
    bare = answer_log_probs(view_decoder(lm.model), lm.tokenizer, requests).before
    assert max(abs(a - b) for a, b in zip(capped, bare, strict=True)) > 0.1


@pytest.fixture
def widths(monkeypatch):
    """Shape of every batch that the model reads, and the number of tokens in it."""
    shapes = []
    original = scoring.before_and_after

    def noted(view, rows, at, edit):
        shapes.append((*rows.input_ids.shape, int(rows.attention_mask.sum())))
        return original(view, rows, at, edit)

    monkeypatch.setattr(scoring, "before_and_after", noted)
    return shapes


def test_answers_to_one_prompt_share_it(tiny, widths):
    lm = tiny()
    view = view_decoder(lm.model)
    requests = [Request(user("Which?"), answer) for answer in ("(A", "(B", "(C", "(A", "other")]
    together = answer_log_probs(view, lm.tokenizer, requests).before
    prompt = "Human: Which?\n\nAssistant:"
    shared, other = len(f"{prompt} (") + 1, len("othe")  # one token a character, and BOS; the last token of an answer is not read
    assert widths == [(1, shared + other, shared + other)]
    assert together[0] == together[3]
    separate = [answer_log_probs(view, lm.tokenizer, [request]).before[0] for request in requests]
    assert together == pytest.approx(separate, rel=1e-4)
    assert together[:3] == pytest.approx([by_transformers(lm.model, lm.tokenizer, prompt, f" {a}") for a in ("(A", "(B", "(C")], rel=1e-4)


def test_before_and_after_are_two_scorings(tiny, choose, family, requests):
    lm = tiny(family)
    view = view_decoder(lm.model)
    before = answer_log_probs(view, lm.tokenizer, requests).before
    edit = NeuronDelta(view, choose(lm, "intermediate"))
    edit.restore({name: torch.randn_like(value) for name, value in edit.deltas().items()})
    after = answer_log_probs(view, lm.tokenizer, requests).before
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1
    both = answer_log_probs(view, lm.tokenizer, requests, edit)
    assert (both.before, both.after) == (pytest.approx(before, rel=1e-5), pytest.approx(after, rel=1e-5))


def test_a_row_shared_by_answers_of_different_lengths(tiny):
    """The same tokens split elsewhere between prompt and answer: what the longer answer says more is counted for it alone."""
    lm, tokenizer = tiny(), tiny_tokenizer(TEMPLATE)
    long = Request(user("Q"), "abc")
    short = Request([*user("Q|<assistant>ab")], "c")
    found = answer_log_probs(view_decoder(lm.model), tokenizer, [long, short]).before
    expected = [
        by_transformers(lm.model, tokenizer, "<user>Q<assistant>", "abc"),
        by_transformers(lm.model, tokenizer, "<user>Q|<assistant>ab<assistant>", "c"),
    ]
    assert found == pytest.approx(expected, rel=1e-4)


def test_batches_hold_no_more_tokens_than_asked(tiny, widths, requests):
    lm = tiny()
    answer_log_probs(view_decoder(lm.model), lm.tokenizer, requests, max_tokens=150)
    assert len(widths) > 1
    assert all(rows * width <= 150 for rows, width, _ in widths)
    alone = sum(len(tokenize(lm.tokenizer, *request).prompt + tokenize(lm.tokenizer, *request).answer) - 1 for request in requests)
    assert sum(tokens for *_, tokens in widths) < 0.7 * alone


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_the_head_in_pieces_equals_the_head_at_once(tiny, monkeypatch, rows):
    monkeypatch.setattr(head, "ROWS", rows)
    view = view_decoder(tiny().model)
    hidden, row, targets = torch.randn(6, 16), torch.randint(0, 6, (10,)), torch.randint(0, 259, (10,))
    dense = view.logits(hidden).double().log_softmax(-1)[row, targets]
    torch.testing.assert_close(token_log_probs(view, hidden, row, targets).double(), dense.detach(), rtol=1e-5, atol=1e-5)
