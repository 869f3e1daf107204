"""Token ids of prompts and answers, with exactly one BOS."""

from __future__ import annotations

import pytest

from bad_neurons.errors import UserError
from bad_neurons.models.prompts import bos_ids, fold_system, readable, tokenize, tokenize_text
from bad_neurons.testing import tiny_tokenizer
from helpers import CHATML

GEMMA_LIKE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_BOS_TEMPLATE = GEMMA_LIKE.removeprefix("{{ bos_token }}")
BOS = 2
ASK = [{"role": "user", "content": "Is it so?"}]
SYSTEM = [{"role": "system", "content": "Be kind."}, *ASK]
LONGER = [*ASK, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"}]
BEGUN = [*ASK, {"role": "assistant", "content": "I believe"}]


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (ASK, "<bos>Human: Is it so?\n\nAssistant:"),
        (SYSTEM, "<bos>Human: Be kind.\n\nIs it so?\n\nAssistant:"),
        (LONGER, "<bos>Human: Is it so?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:"),
        (BEGUN, "<bos>Human: Is it so?\n\nAssistant: I believe"),
    ],
)
def test_base_form(turns, expected):
    tokenizer = tiny_tokenizer()
    prompt, answer = tokenize(tokenizer, turns, "No.")
    assert read(tokenizer, prompt) == expected
    assert prompt.count(BOS) == 1
    assert read(tokenizer, answer) == " No."


@pytest.mark.parametrize("template", [GEMMA_LIKE, NO_BOS_TEMPLATE])
@pytest.mark.parametrize(
    ("turns", "expected", "answer"),
    [
        (ASK, "<bos><start_of_turn>user\nIs it so?<end_of_turn>\n<start_of_turn>model\n", "No."),
        (SYSTEM, "<bos><start_of_turn>user\nBe kind.\n\nIs it so?<end_of_turn>\n<start_of_turn>model\n", "No."),
        (
            LONGER,
            "<bos><start_of_turn>user\nIs it so?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
            "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
            "No.",
        ),
        (BEGUN, "<bos><start_of_turn>user\nIs it so?<end_of_turn>\n<start_of_turn>model\nI believe", " No."),
    ],
)
def test_chat_template(template, turns, expected, answer):
    tokenizer = tiny_tokenizer(template)
    ids = tokenize(tokenizer, turns, "No.")
    assert read(tokenizer, ids.prompt) == expected
    assert ids.prompt.count(BOS) == 1
    assert read(tokenizer, ids.answer) == answer


PREAMBLE = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"


@pytest.mark.parametrize(
    ("turns", "expected", "answer"),
    [
        (ASK, PREAMBLE + "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n", "No."),
        (SYSTEM, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n", "No."),
        (
            LONGER,
            PREAMBLE + "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
            "No.",
        ),
        (BEGUN, PREAMBLE + "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\nI believe", " No."),
    ],
)
def test_a_template_with_a_system_role(turns, expected, answer):
    tokenizer = tiny_tokenizer(CHATML)
    ids = tokenize(tokenizer, turns, "No.")
    assert read(tokenizer, ids.prompt) == "<bos>" + expected
    assert read(tokenizer, ids.answer) == answer


def test_the_template_itself_refuses_a_system_turn():
    with pytest.raises(Exception, match="System role not supported"):
        tiny_tokenizer(GEMMA_LIKE).apply_chat_template(SYSTEM, tokenize=False)


def test_turns_that_a_template_refuses():
    with pytest.raises(UserError, match=r"turns of system, assistant: the model's chat template refuses it \(System role not supported\)"):
        tokenize(tiny_tokenizer(GEMMA_LIKE), [SYSTEM[0], BEGUN[1]])


def test_the_naive_way_would_give_two():
    tokenizer = tiny_tokenizer(GEMMA_LIKE)
    assert tokenizer(tokenizer.apply_chat_template(ASK, tokenize=False))["input_ids"].count(BOS) == 2


def test_a_tokenizer_that_adds_no_bos_gets_none():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    assert bos_ids(tokenizer) == []
    assert read(tokenizer, tokenize(tokenizer, ASK).prompt) == "Human: Is it so?\n\nAssistant:"
    assert tokenize_text(tokenizer, "a") == tokenizer("a")["input_ids"]


@pytest.mark.parametrize("template", [None, GEMMA_LIKE, CHATML])
@pytest.mark.parametrize("turns", [ASK, SYSTEM, LONGER, BEGUN])
def test_a_prompt_has_the_same_ids_whatever_answers_it(template, turns):
    tokenizer = tiny_tokenizer(template)
    prompts = [tokenize(tokenizer, turns, answer).prompt for answer in ("", "No.", " (A)", "I believe it, as you do.")]
    assert all(prompt == prompts[0] for prompt in prompts)
    assert tokenize(tokenizer, turns).answer == []


def test_fold_system_leaves_the_given_turns_alone():
    assert fold_system(SYSTEM) == [{"role": "user", "content": "Be kind.\n\nIs it so?"}]
    assert SYSTEM[0] == {"role": "system", "content": "Be kind."}
    assert fold_system(LONGER) == LONGER


def test_readable():
    assert readable(ASK) == "Is it so?"
    assert readable(LONGER) == "Human: Is it so?\n\nAssistant: Yes.\n\nHuman: Sure?"
    assert readable(SYSTEM) == "Be kind.\n\nHuman: Is it so?"


def test_running_text():
    tokenizer = tiny_tokenizer(GEMMA_LIKE)
    assert read(tokenizer, tokenize_text(tokenizer, "Snow is white.")) == "<bos>Snow is white."


def test_system_text_that_no_user_follows_stands_as_it_is():
    tokenizer = tiny_tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
    assert tokenizer.decode(tokenize(tokenizer, turns).prompt) == "<bos>Human: a\n\nb\n\nHuman: c\n\nAssistant:"
    opening = [{"role": "system", "content": "b"}, {"role": "assistant", "content": "I"}]
    assert tokenizer.decode(tokenize(tokenizer, opening).prompt) == "<bos>b\n\nAssistant: I"
