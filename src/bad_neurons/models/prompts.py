"""From prompt turns and an answer to token ids, with exactly one BOS.

A chat model gets its own template; a base model the published form of the model-written evaluations
("Human: ... Assistant: ...", arXiv 2212.09251). A last turn of the assistant is the beginning of its answer, which the
model continues. A system turn keeps its role where the template has one (others, such as SmolLM2's, would put a text of their
own in its place), and becomes part of the first user turn where it has none, as Gemma's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from bad_neurons.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


class Tokenized(NamedTuple):
    """Token ids of a prompt and of the answer that follows it.

    Attributes:
        prompt: ids of the prompt, BOS first where the tokenizer has one.
        answer: ids of the answer alone.
    """

    prompt: list[int]
    answer: list[int]


def tokenize(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], answer: str = "") -> Tokenized:
    """Token ids of ``turns`` and of ``answer`` behind them.

    The two are tokenized apart, so a prompt has the same ids whatever answers it.

    Raises:
        UserError: the chat template refuses the turns.
    """
    text = _chat(tokenizer, list(turns)) if tokenizer.chat_template else _dialogue(fold_system(turns))
    prompt = bos_ids(tokenizer) + _plain_ids(tokenizer, _without_bos(tokenizer, text))
    return Tokenized(prompt, answer_ids(tokenizer, turns, answer))


def answer_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], answer: str) -> list[int]:
    """Token ids of ``answer`` behind ``turns``: with a space in front, unless a chat template has just opened the answer."""
    spaced = not tokenizer.chat_template or turns[-1]["role"] == "assistant"
    return _plain_ids(tokenizer, f" {answer}" if spaced else answer) if answer else []


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of running text, BOS first where the tokenizer has one."""
    return bos_ids(tokenizer) + _plain_ids(tokenizer, text)


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The one BOS id that this tokenizer puts before a text, or nothing."""
    bos = tokenizer.bos_token_id
    starts_with_it = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos] if starts_with_it else []  # type: ignore[list-item]


def readable(turns: Sequence[Turn]) -> str:
    """Turns as people read them: the words of a single one, or a conversation with its speakers."""
    return turns[0]["content"] if len(turns) == 1 else "\n\n".join(_lines(turns))


def fold_system(turns: Sequence[Turn]) -> list[Turn]:
    """Put a leading system turn into the first user turn."""
    if [turn["role"] for turn in turns[:2]] == ["system", "user"]:
        first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        return [first, *turns[2:]]
    return list(turns)


def _chat(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> str:
    from jinja2 import TemplateError

    unfinished = turns[-1]["role"] == "assistant"

    def filled(turns: list[Turn]) -> str:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not unfinished, continue_final_message=unfinished)
        )

    try:
        return filled(turns)
    except TemplateError:  # templates without a system role refuse one
        try:
            return filled(fold_system(turns))
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(f"prompt with turns of {roles}: the model's chat template refuses it ({error})") from error


def _dialogue(turns: list[Turn]) -> str:
    lines = _lines(turns)
    if turns[-1]["role"] != "assistant":
        lines.append("Assistant:")
    return "\n\n".join(lines)


def _lines(turns: Sequence[Turn]) -> list[str]:
    return [turn["content"] if turn["role"] == "system" else f"{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns]


def _without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return text.removeprefix(tokenizer.bos_token) if bos_ids(tokenizer) else text  # type: ignore[arg-type]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
