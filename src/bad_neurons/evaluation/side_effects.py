"""What a correction cost: KL to the clean model and perplexity on unrelated text.

Legend: N tokens, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bad_neurons.batching import Rows, batches_by_length, pack_sequences
from bad_neurons.errors import RunError
from bad_neurons.models.head import ROWS, Logits
from bad_neurons.models.passes import Switch, before_and_after, final_hidden
from bad_neurons.models.prompts import tokenize_text
from bad_neurons.models.view import DecoderView
from bad_neurons.numbers import check_finite
from bad_neurons.ranks import ALONE, Rank

_MOST_NATS = 700.0  # the largest float64 is e to the 709.8


@dataclass
class CleanStates:
    """What one clean model makes of the texts, kept between calls that measure many edits of it on the same texts.

    Attributes:
        final: final hidden states [N, d] of each batch, by the token ids of its rows.
    """

    final: dict[tuple[tuple[int, ...], ...], Tensor] = field(default_factory=dict)

    def both_sides(self, view: DecoderView, rows: Rows, at: Tensor, edit: Switch | None) -> tuple[Tensor, Tensor]:
        """Final hidden states [N, d] at flat places ``at`` [N] of ``rows``, without and with ``edit``."""
        key = tuple(tuple(ids[:n]) for ids, n in zip(rows.input_ids.tolist(), rows.attention_mask.sum(1).tolist(), strict=True))
        if edit is not None and key in self.final:
            return self.final[key], final_hidden(view, rows, at)
        before, after = before_and_after(view, rows, at, edit)
        self.final[key] = before
        return before, after


def side_effects(
    view: DecoderView,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    edit: Switch | None = None,
    max_length: int = 256,
    max_tokens: int = 2048,
    clean: CleanStates | None = None,
    rank: Rank = ALONE,
) -> dict[str, float]:
    """KL(clean || edited) per token in nats, and the perplexity of both, over running text.

    Args:
        view: the model with its edit on, or without one.
        tokenizer: its tokenizer.
        texts: paragraphs that the tuning has not seen.
        edit: the edit that is on; None where there is none.
        max_length: tokens of a paragraph that are read.
        max_tokens: tokens of one batch after padding.
        clean: is filled by the first call; in later ones only the model with its edit on runs. One object for one model.
        rank: which of several processes this is; each reads its part of the batches, and all get the result of all.
    """
    sequences = [s for text in texts if len(s := tokenize_text(tokenizer, text)[:max_length]) > 1]
    batches = batches_by_length([len(s) for s in sequences], max_tokens)
    parts = torch.zeros(len(batches), 4, dtype=torch.float64)  # of each: KL, negative log-likelihood before and after, tokens
    for number in tqdm(rank.share(range(len(batches))), desc="side effects", unit="batch", leave=False, disable=rank.number > 0):
        rows = pack_sequences([sequences[i] for i in batches[number]]).to(view.device)
        ids, at = rows.input_ids.flatten(), rows.followed()
        before, after = (clean or CleanStates()).both_sides(view, rows, at, edit)
        parts[number, :3], parts[number, 3] = _sums(view, before, after, ids[at + 1]), len(at)
    *sums, count = sum(rank.total(parts), torch.zeros(4, dtype=torch.float64)).tolist()  # in one order, however they were divided
    kl, nll_before, nll_after = (s / count for s in sums)
    result = {"tokens": int(count), "perplexity_before": _perplexity(nll_before)}
    return result if edit is None else result | {"kl_per_token": kl, "perplexity_after": _perplexity(nll_after)}


def _perplexity(nats: float) -> float:
    """``e`` to the nats per token.

    Raises:
        RunError: too large for a number.
    """
    if nats > _MOST_NATS:
        raise RunError(
            f"side effects: {nats:.0f} nats per token on unrelated text, a perplexity beyond every number: the model is destroyed"
        )
    return math.exp(nats)


def text_kl(view: DecoderView, sequences: Sequence[Sequence[int]], edit: Switch, clean: CleanStates, max_tokens: int = 2048) -> float:
    """KL(clean || edited) per token in nats over token sequences, as :func:`side_effects` has it over texts."""
    total, count = 0.0, 0
    for batch in batches_by_length([len(s) for s in sequences], max_tokens):
        rows = pack_sequences([sequences[i] for i in batch]).to(view.device)
        at = rows.followed()
        total += float(_sums(view, *clean.both_sides(view, rows, at, edit), rows.input_ids.flatten()[at + 1])[0])
        count += len(at)
    return total / max(1, count)


def _sums(view: DecoderView, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
    """Sums [3] of KL and of the negative log-likelihoods before and after, at hidden states [N, d] that predict ``targets`` [N]."""
    sums = torch.zeros(3, dtype=torch.float64)
    for b, a, t in zip(before.split(ROWS), after.split(ROWS), targets.split(ROWS), strict=True):
        sides, every = (Logits(view, b), Logits(view, a)), torch.arange(len(t), device=t.device)
        kl = sides[0].kl_to(sides[1])
        nll = [side.log_norm.squeeze(-1) - side.at(every, t) for side in sides]
        sums += torch.stack([x.double().sum() for x in (kl, *nll)]).cpu()
    check_finite(sums, "side effects: KL and log-likelihood on unrelated text")
    return sums
