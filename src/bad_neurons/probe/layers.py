"""Greedy forward selection of the layers that a probe reads (arXiv 2601.18939, the probe's layers).

Start with none, add the layer with which a probe does best on the validation side, and stop when no layer improves it or the
budget is used. Every probe is fitted to the end, on Gram matrices (:mod:`bad_neurons.probe.gram`).

Legend: L candidate layers, N training examples, M validation examples, D features of a layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from bad_neurons.errors import UserError
from bad_neurons.probe.gram import DualLogistic, Gram, gram, side_by_side, validation_logits

Score = Literal["auroc", "accuracy", "log_loss"]

_MAX_WORKERS = 8  # Python's lock lets no more of them work at once


class Scores(NamedTuple):
    """How well a probe does on the validation side.

    Attributes:
        auroc: probability that a sycophantic answer gets higher log-odds than an honest one; 0.5 is chance.
        accuracy: share of answers on the right side of log-odds 0.
        log_loss: mean negative log-likelihood in nats.
    """

    auroc: float
    accuracy: float
    log_loss: float


class Step(NamedTuple):
    """One round of the selection.

    Attributes:
        layer: the best candidate of this round.
        scores: of a probe on the layers taken before and this one.
        taken: False where it does not improve the score; the selection ends there.
        candidates: scores of a probe on the layers taken before and each candidate, by layer.
    """

    layer: int
    scores: Scores
    taken: bool
    candidates: dict[int, Scores]


@dataclass(frozen=True)
class LayerSelection:
    """What :func:`select_layers` found.

    Attributes:
        steps: the rounds; all but the last are taken, and the last one too where the budget ended the selection.
        without: scores without any layer, the bias alone.
        everything: scores of a probe on all candidates.
    """

    steps: tuple[Step, ...]
    without: Scores
    everything: Scores

    @property
    def order(self) -> list[int]:
        """The layers in the order in which they were taken."""
        return [step.layer for step in self.steps if step.taken]

    @property
    def chosen(self) -> list[int]:
        """The layers that were taken, from the lowest up."""
        return sorted(self.order)


class _Logits(NamedTuple):
    train: Tensor
    validation: Tensor


def select_layers(
    train: Mapping[int, Tensor],
    validation: Mapping[int, Tensor],
    y_train: Tensor,
    y_validation: Tensor,
    l2: float,
    budget: int | None = None,
    score: Score = "auroc",
) -> LayerSelection:
    """Choose layers by greedy forward selection.

    Equal scores are decided by the log loss, then for the lower layer. The scores of the chosen layers are the best of many,
    so they flatter; measure them on the test side, which is not used here.

    Args:
        train: training features by layer, [N, D] each.
        validation: validation features by layer, [M, D] each.
        y_train: labels [N], 1 is sycophantic.
        y_validation: labels [M].
        l2: penalty on the squared norm of the weights, per example, as the probe has it.
        budget: at most so many layers; None is a third of the candidates, rounded.
        score: what decides. ``auroc`` counts every pair of answers; ``accuracy`` often ties on a few hundred answers, and
            depends on the bias; ``log_loss`` also rewards calibration, which the same penalty gives less of the more layers there are.

    Raises:
        UserError: an option out of range, labels of one kind, or features that are not finite.
    """
    layers = sorted(train)
    check_options(layers, l2, budget)
    for side, y in (("training", y_train), ("validation", y_validation)):
        if not 0 < int(y.sum()) < len(y):
            raise UserError(f"{side} labels: {int(y.sum())} of {len(y)} are 1; layers are chosen by answers of both kinds")
    count = min(torch.get_num_threads(), _MAX_WORKERS)
    check_memory(len(layers), len(y_train), len(y_validation), count)
    with _single_threads(count) as workers:
        grams = _all_grams(workers, layers, train, validation)
        greedy = _Greedy(workers, [DualLogistic(y_train, l2) for _ in range(count)], grams, y_validation, score)
        return greedy.run(round(len(layers) / 3) or 1 if budget is None else budget)


def check_options(layers: Sequence[int], l2: float, budget: int | None) -> None:
    """Refuse options of :func:`select_layers` that make no sense, before anything is computed.

    Raises:
        UserError: no layer or one of them twice, a penalty that is not above 0, or a budget outside 1 to L.
    """
    if not layers or len(set(layers)) < len(layers):
        raise UserError(f"--candidates {list(layers)}: one layer or more, each of them once")
    if not l2 > 0:
        raise UserError(f"--l2 {l2}: above 0; without a penalty the weights of a probe that separates its examples have no end")
    if budget is not None and not 1 <= budget <= len(layers):
        raise UserError(f"--budget {budget}: 1 to {len(layers)} (the candidate layers), or null for a third of them")


def check_memory(layers: int, n: int, m: int, workers: int) -> None:
    """Refuse Gram matrices of N training and M other answers that do not fit into memory, with ``workers`` fits beside them.

    Raises:
        UserError: they do not fit.
    """
    # Linux hands out more memory than there is, and ends the process without a word when it is used.
    if not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 4 * layers * n * (n + m) + 16 * workers * n * n
    if needed > there:
        raise UserError(
            f"--max_records: the inner products of {n} training answers at {layers} layers take {needed / 2**30:.0f} GiB, more than "
            f"the {there / 2**30:.0f} GiB of this machine; {int(n * there / needed / 4)} records fit well"
        )


@contextmanager
def _single_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Workers that compute with one thread each: many small problems side by side, since one is too small for many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


def _all_grams(
    workers: ThreadPoolExecutor, layers: Sequence[int], train: Mapping[int, Tensor], validation: Mapping[int, Tensor]
) -> dict[int, Gram]:
    found = workers.map(lambda layer: gram(train[layer], validation[layer]), layers)
    grams = dict(zip(layers, tqdm(found, "Gram matrices", len(layers), unit="layer"), strict=True))
    for layer, one in grams.items():
        if not math.isfinite(one.squares + float(one.validation.sum())):
            raise UserError(f"features of layer {layer}: not all of them are finite numbers; extract them in float32 (--dtype float32)")
    return grams


class _Greedy:
    """The rounds of :func:`select_layers`.

    Args:
        workers: where candidates are fitted side by side.
        solvers: one for each worker.
        grams: Gram matrices of the candidates, by layer.
        y: validation labels [M].
        score: what decides.
    """

    def __init__(
        self, workers: ThreadPoolExecutor, solvers: Sequence[DualLogistic], grams: Mapping[int, Gram], y: Tensor, score: Score
    ) -> None:
        self._workers, self._grams, self._y, self._score = workers, grams, y.double(), score
        self._idle: SimpleQueue[DualLogistic] = SimpleQueue()
        for solver in solvers:
            self._idle.put(solver)
        self._logits = solvers[0].base_rate
        self._taken: list[Gram] = []  # the features of all layers taken, as one

    def run(self, budget: int) -> LayerSelection:
        without = best = validation_scores(self._logits[:1].expand(len(self._y)), self._y)
        rest = list(self._grams)
        steps: list[Step] = []
        with tqdm(total=sum(len(rest) - i for i in range(budget)), desc="probes of candidate layers", unit="probe") as bar:
            while len(steps) < budget:
                fits = []
                for fit in self._workers.map(self._fit, ([*self._taken, self._grams[layer]] for layer in rest)):
                    fits.append(fit)
                    bar.update()
                scores = dict(zip(rest, scores_of_each(torch.stack([fit.validation for fit in fits]), self._y), strict=True))
                first = max(rest, key=lambda layer: (self._value(scores[layer]), -scores[layer].log_loss, -layer))
                improves = self._value(scores[first]) > self._value(best)
                steps.append(Step(first, scores[first], improves, scores))
                if not improves:
                    bar.total = bar.n
                    break
                best = scores[first]
                self._logits = fits[rest.index(first)].train
                self._taken = [side_by_side(taken, self._grams[first]) for taken in self._taken] or [self._grams[first]]
                rest.remove(first)
        return LayerSelection(tuple(steps), without, validation_scores(self._fit(list(self._grams.values())).validation, self._y))

    def _fit(self, grams: Sequence[Gram]) -> _Logits:
        solver = self._idle.get()
        try:
            fit = solver.fit(grams, self._logits)
        finally:
            self._idle.put(solver)
        return _Logits(fit.logits, validation_logits(fit, grams))

    def _value(self, scores: Scores) -> float:
        return -scores.log_loss if self._score == "log_loss" else float(getattr(scores, self._score))


def validation_scores(logits: Tensor, y: Tensor) -> Scores:
    """Scores of log-odds [M] for labels [M]; pairs with the same log-odds count half for the AUROC."""
    return scores_of_each(logits[None], y)[0]


def scores_of_each(logits: Tensor, y: Tensor) -> list[Scores]:
    """Scores of the log-odds of C probes, [C, M], for labels [M]."""
    positive, negative = logits[:, y > 0].contiguous(), logits[:, y <= 0].sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    auroc = below.double().mean(1) / (2 * negative.shape[1])
    accuracy = ((logits > 0) == (y > 0)).double().mean(1)
    log_loss = F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none").mean(1)
    return [Scores(*row) for row in zip(auroc.tolist(), accuracy.tolist(), log_loss.tolist(), strict=True)]
