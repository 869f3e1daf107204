"""Tuning benchmark: masked full matrices with a second model, and peft's adapters, on plain transformers.

Two forms of each. ``written``: labels passed to transformers and logits for every token, as people write it.
``needed``: the head at supervised positions only, and plain attention, savings of ours given to them.

Legend: B rows, T positions (right padding), N supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from harness import Round
from torch import Tensor, nn
from tuning_common import ALPHA, D_MODEL, LR, MODEL, RECORDS, Losses, chosen_indices, epochs, saved, settle

from bad_neurons.batching import pack_sequences
from bad_neurons.data.readers import load_records
from bad_neurons.data.splits import split_by_topic
from bad_neurons.data.tuning import draw_evenly
from bad_neurons.models.load import LanguageModel, load_model
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import MATRICES

Form = Literal["written", "needed"]
ATTENTION = {"written": "sdpa", "needed": "eager"}  # transformers' default, and ours on a processor (attention.py)
BATCH = 8  # records


class Batch(NamedTuple):
    """What a competitor reads.

    Attributes:
        input_ids: [B, T], int64, padded on the right.
        attention_mask: [B, T], int64.
        labels: [B, T], int64; answer tokens in their own places, as transformers wants them, and -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def masked_setup(layers: Sequence[int], form: Form, count: int) -> Round:
    """Full matrices under a gradient mask with AdamW over them, and a second model for the KL."""
    tuned = _load(form)
    clean = load_model(MODEL, "bfloat16", "cpu").model
    clean.set_attn_implementation(ATTENTION[form])
    weights = mask_gradients(tuned.model, layers)
    return epochs(padded_batches(tuned, count), weights, _losses(tuned.model, lambda: nullcontext(clean), form))


def peft_setup(layers: Sequence[int], form: Form, count: int, method: Literal["lora", "shira"]) -> Round:
    """An adapter of peft on the MLP matrices; the clean model is the same one with the adapter disabled."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    tuned = _load(form)
    where = rf".*\.layers\.({'|'.join(map(str, layers))})\.mlp\.({'|'.join(MATRICES)})"
    # SHiRA learns r (in + out) values of a matrix: 14 comes nearest to 19 rows or columns of 2,048, which are 3 %.
    config = LoraConfig(r=16, lora_alpha=16, target_modules=where) if method == "lora" else ShiraConfig(r=14, target_modules=where)
    adapter = get_peft_model(tuned.model, config)

    @contextmanager
    def clean() -> Iterator[nn.Module]:
        with adapter.disable_adapter():
            yield tuned.model

    weights = [p for p in adapter.parameters() if p.requires_grad]
    return epochs(padded_batches(tuned, count), weights, _losses(tuned.model, clean, form))


def masked_checkpoint_setup(layers: Sequence[int]) -> Round:
    """Lightning's default checkpoint of the masked form; the frozen second model is kept out of it."""
    tuned = _load("needed")
    clean = load_model(MODEL, "bfloat16", "cpu").model
    weights = mask_gradients(tuned.model, layers)
    losses = _losses(tuned.model, lambda: nullcontext(clean), "needed")
    return saved(_MaskedModule(tuned.model, weights, losses), padded_batches(tuned, BATCH))


class _MaskedModule(L.LightningModule):
    def __init__(self, model: nn.Module, weights: list[nn.Parameter], losses: Callable[[Batch], Losses]) -> None:
        super().__init__()
        self.model, self._weights, self._losses = model, weights, losses

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._losses(batch).mean

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._weights, lr=LR, weight_decay=0.0)


def padded_batches(model: LanguageModel, count: int) -> list[Batch]:
    """The records that :class:`SycophancyDataModule` draws, eight of similar length in a batch."""
    records = draw_evenly(split_by_topic(load_records(RECORDS), 0.2, 0.2, 0).train, count, 0)
    rows = sorted((tokenize(model.tokenizer, r.prompt, r.honest) for r in records), key=lambda row: len(row.prompt + row.answer))
    batches = []
    for picked in (rows[start : start + BATCH] for start in range(0, len(rows), BATCH)):
        padded = pack_sequences([row.prompt + row.answer for row in picked])
        labels = torch.full_like(padded.input_ids, -100)
        for number, row in enumerate(picked):
            labels[number, len(row.prompt) : len(row.prompt + row.answer)] = torch.tensor(row.answer)
        batches.append(Batch(padded.input_ids, padded.attention_mask, labels))
    return batches


def mask_gradients(model: Any, layers: Sequence[int]) -> list[nn.Parameter]:
    """Let the MLP matrices of ``layers`` learn where the chosen indices own them; gives those matrices."""
    weights = []
    for layer, chosen in chosen_indices(layers).items():
        mask = torch.zeros(D_MODEL, dtype=torch.bfloat16).index_fill_(0, torch.tensor(chosen), 1.0)
        for name in MATRICES:
            weight: nn.Parameter = getattr(model.model.layers[layer].mlp, name).weight
            weight.requires_grad_(True)
            own = mask[:, None] if name == "down_proj" else mask
            weight.register_hook(lambda gradient, own=own: gradient * own)  # type: ignore[misc]
            weights.append(weight)
    return weights


def _load(form: Form) -> LanguageModel:
    loaded = load_model(MODEL, "bfloat16", "cpu")
    loaded.model.set_attn_implementation(ATTENTION[form])
    settle(loaded.model)
    return loaded


def _losses(model: Any, reference: Callable[[], AbstractContextManager[Any]], form: Form) -> Callable[[Batch], Losses]:
    """CE + alpha KL; ``reference`` opens the clean model."""
    forward = {"written": _written, "needed": _needed}[form]

    def losses(batch: Batch) -> Losses:
        at = batch.labels.roll(-1, 1) != -100
        ce, logits, clean = forward(model, reference, batch, at)
        kl = F.kl_div(logits.log_softmax(-1), clean.log_softmax(-1), reduction="batchmean", log_target=True)
        return Losses(ce + ALPHA * kl, ce, kl, len(logits))

    return losses


def _written(model: Any, reference: Callable[[], Any], batch: Batch, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean CE, and logits [N, V] of both models, by way of all logits [B, T, V]."""
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    output = model(**rows, labels=batch.labels)
    with torch.no_grad(), reference() as clean:
        clean_logits = clean(**rows).logits
    return output.loss, output.logits[at].float(), clean_logits[at].float()


def _needed(model: Any, reference: Callable[[], Any], batch: Batch, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the head at ``at`` [B, T] only (Gemma 3 has no soft cap)."""

    def logits(of: Any) -> Tensor:
        hidden = of.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        return of.lm_head(hidden[at]).float()  # type: ignore[no-any-return]

    tuned = logits(model)
    with torch.no_grad(), reference() as clean:
        clean_logits = logits(clean)
    return F.cross_entropy(tuned, batch.labels.roll(-1, 1)[at]), tuned, clean_logits
