"""Real answers: greedy generation before and after."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bad_neurons.models.prompts import Turn, tokenize
from bad_neurons.ranks import ALONE, Rank

_BATCH = 16  # prompts that are continued together, padded on the left


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Turn]],
    max_new_tokens: int = 40,
    rank: Rank = ALONE,
) -> list[str]:
    """The model's own answer to each prompt, without sampling, cut where it would go on to a further turn.

    Args:
        model: the model, with whatever edits are on.
        tokenizer: its tokenizer.
        prompts: the turns of each.
        max_new_tokens: length of an answer at most.
        rank: which of several processes this is; each continues its part of the prompts, and all get the answers of all.
    """
    ids = [tokenize(tokenizer, turns).prompt for turns in prompts]
    starts = range(0, len(ids), _BATCH)
    mine = {start: _continue(model, tokenizer, ids[start : start + _BATCH], max_new_tokens) for start in rank.share(starts)}
    every = {start: answers for part in rank.gather(mine) for start, answers in part.items()}
    return [answer for start in starts for answer in every[start]]


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, top_k=None, top_p=None, pad_token_id=pad,
        )  # fmt: skip
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [re.split(r"\n+(?:Human|Assistant)\b:?", text)[0].strip() for text in texts]
