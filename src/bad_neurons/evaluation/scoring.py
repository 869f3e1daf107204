"""Log-probabilities of answers under a model, without and with its edit.

Legend: N tokens that are scored, U places that predict them, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bad_neurons.batching import Rows, shared_batches
from bad_neurons.models.head import token_log_probs
from bad_neurons.models.passes import Switch, before_and_after
from bad_neurons.models.prompts import Turn, tokenize
from bad_neurons.models.view import DecoderView
from bad_neurons.numbers import check_finite
from bad_neurons.ranks import ALONE, Rank


class Request(NamedTuple):
    """An answer whose log-probability is wanted.

    Attributes:
        turns: the prompt.
        answer: the text that follows it.
    """

    turns: Sequence[Turn]
    answer: str


class Score(NamedTuple):
    """What a model says of an answer.

    Attributes:
        log_prob: sum of the log-probabilities of its tokens, in nats.
        tokens: number of its tokens.
    """

    log_prob: float
    tokens: int


class Sides(NamedTuple):
    """The same measured without and with an edit.

    Attributes:
        before: of the model with the edit off, or of the model as it is where there is none.
        after: with the edit on; None where there is none.
    """

    before: list[Any]
    after: list[Any] | None


def answer_log_probs(
    view: DecoderView,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    edit: Switch | None = None,
    max_tokens: int = 2048,
    what: str = "scoring",
    rank: Rank = ALONE,
) -> Sides:
    """Sum of the log-probabilities, in nats, of each answer's tokens, without and with an edit.

    What requests share at their beginning is read once: the answers to one prompt cost little more than the prompt, and a
    question asked by two people is scored once without them. Layers below the edit run once for both sides.

    Args:
        view: the model, with ``edit`` on.
        tokenizer: its tokenizer.
        requests: what to score.
        edit: the edit to switch off for ``before``; None where there is none.
        max_tokens: tokens of one batch after padding, and of one row.
        what: text of the progress bar.
        rank: which of several processes this is; each scores its part of the batches, and all get the scores of all.

    Raises:
        RuntimeError: a request was scored twice or not at all.
    """
    tokens = [tokenize(tokenizer, request.turns, request.answer) for request in requests]
    read = [ids.prompt + ids.answer[:-1] for ids in tokens]  # nothing is predicted behind the last token
    found = torch.zeros(3, len(requests), dtype=torch.float64)  # before, after, how often it was scored
    for batch in tqdm(rank.share(shared_batches(read, max_tokens)), desc=what, unit="batch", leave=False, disable=rank.number > 0):
        places = [path[-len(tokens[number].answer) :] for number, path in zip(batch.numbers, batch.paths, strict=True)]
        sides = _score(view, batch.rows, places, [tokens[number].answer for number in batch.numbers], edit)
        for scores, side in zip(sides, ("", " with the delta"), strict=True):
            check_finite(scores, f"{what}: log-probabilities of answers{side if edit else ''}")
        found[:, batch.numbers] += torch.stack([*(scores.cpu().double() for scores in sides), torch.ones(len(places))])
    found = rank.total(found)
    if not (found[2] == 1).all():
        raise RuntimeError(f"{int((found[2] != 1).sum())} of {len(requests)} answers were not scored exactly once")
    return Sides(found[0].tolist(), found[1].tolist() if edit else None)


def _score(view: DecoderView, rows: Rows, places: list[list[int]], answers: list[list[int]], edit: Switch | None) -> tuple[Tensor, Tensor]:
    """Scores of the answers of one batch, before and after, each [number of answers]; ``places`` predict the answers' tokens."""
    flat = torch.tensor([place for path in places for place in path])
    at, row = flat.unique(return_inverse=True)  # one place predicts the next token of several answers
    targets = torch.tensor([token for answer in answers for token in answer])
    hidden = before_and_after(view, rows.to(view.device), at.to(view.device), edit)
    lengths = [len(answer) for answer in answers]
    scores = [
        torch.stack([part.sum() for part in token_log_probs(view, h, row, targets).split(lengths)]) for h in hidden[: 2 if edit else 1]
    ]
    return scores[0], scores[-1]
