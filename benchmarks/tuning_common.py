"""Tuning benchmark: what all contenders share (data, indices, optimizer, what is counted)."""

from __future__ import annotations

import ctypes
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from harness import Round, mark_base
from torch import Tensor, nn
from torch.utils.data import DataLoader

MODEL, RECORDS, D_MODEL, LAYERS = "packaged:gemma-3-270m", "anthropic:phil", 640, 18
SHARE, ALPHA, LR = 0.03, 1.0, 1e-4


class Losses(NamedTuple):
    """Losses of one batch, in nats.

    Attributes:
        mean: what is minimised, over the batch's answer tokens; carries the gradient.
        ce: mean cross entropy of the answers.
        kl: mean KL(clean || tuned).
        answers: number of answer tokens.
    """

    mean: Tensor
    ce: Tensor
    kl: Tensor
    answers: int


def chosen_indices(layers: Iterable[int]) -> dict[int, list[int]]:
    """The same random 3 % of the residual indices of each layer for everybody."""
    count = round(SHARE * D_MODEL)
    return {n: sorted(torch.randperm(D_MODEL, generator=torch.Generator().manual_seed(n))[:count].tolist()) for n in layers}


def settle(model: Any) -> None:
    """Bring in what the first use of anything brings in, so that memory above the base is the contender's own doing.

    That is the weights (mapped from the file until they are read), thread pools, and what torch imports with a first
    optimizer. The level behind it, with what loading has freed given back to the system, is the base.
    """
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 4:] = 0
    weight = nn.Parameter(torch.zeros(D_MODEL, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight])
    hidden = model.model(input_ids=torch.arange(16).reshape(2, 8), attention_mask=mask, use_cache=False).last_hidden_state
    model.lm_head(hidden + weight).float().logsumexp(-1).sum().backward()
    optimizer.step()
    ctypes.CDLL(None).malloc_trim(0)
    mark_base()


def epochs(batches: Sequence[Any], weights: list[nn.Parameter], losses: Callable[[Any], Losses]) -> Round:
    """One epoch a round. The first one has learning rate 0, so its losses are those of the untouched model."""
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    start: dict[str, float] = {}
    tokens = sum(int(getattr(batch, "rows", batch).attention_mask.sum()) for batch in batches)

    def run() -> dict[str, Any]:
        ce = kl = answers = 0.0
        for batch in batches:
            found = losses(batch)
            found.mean.backward()
            optimizer.step()
            optimizer.zero_grad()
            ce += float(found.ce.detach()) * found.answers
            kl += float(found.kl.detach()) * found.answers
            answers += found.answers
        last = {"ce": ce / answers, "kl": kl / answers}
        if not start:
            start.update(last)
            optimizer.param_groups[0]["lr"] = LR
        counted = {"units": tokens, "answer_tokens": int(answers), "steps": len(batches), "trained": sum(w.numel() for w in weights)}
        return {**counted, "start": start, "last": last}

    return run


def saved(module: L.LightningModule, batches: Sequence[Any]) -> Round:
    """Fit one step with Lightning, then let it save its checkpoint; a round gives the file's ``bytes``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loader processes and modules in evaluation mode
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(list(batches), batch_size=None))  # type: ignore[arg-type]

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "last.ckpt"
            trainer.save_checkpoint(path)
            return {"bytes": path.stat().st_size}

    return run
