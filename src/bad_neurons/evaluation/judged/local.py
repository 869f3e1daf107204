"""A local model as a judge: the probability that it gives to each score.

Nothing is generated, so every answer gets a score, whatever the model would have said. Small models hardly tell answers apart
in this way; :mod:`.agreement` says how far they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from bad_neurons.artifacts import digest_json
from bad_neurons.evaluation.judged.judge import Verdict
from bad_neurons.evaluation.judged.tests import JudgeQuestion
from bad_neurons.evaluation.scoring import Request, answer_log_probs
from bad_neurons.models.load import LanguageModel
from bad_neurons.models.prompts import Turn
from bad_neurons.models.view import view_decoder

Reading = Literal["expected", "likeliest"]

_LEAD: Turn = {"role": "assistant", "content": "Score:"}


class LocalJudge:
    """A model on this machine.

    Args:
        lm: the model.
        reading: ``expected``: the mean of the scale's numbers under their probabilities; ``likeliest``: the one with the highest.
    """

    together = 32

    def __init__(self, lm: LanguageModel, reading: Reading = "expected") -> None:
        self.name = f"{lm.id} ({reading})"
        self.key = digest_json(["local", lm.digest, str(lm.model.dtype), reading])
        self._lm, self._reading, self._view = lm, reading, view_decoder(lm.model)

    def ask(self, questions: Sequence[JudgeQuestion], keep: Callable[[int, Verdict], None]) -> None:
        """Score the questions, some together."""
        for start in range(0, len(questions), self.together):
            group = questions[start : start + self.together]
            requests = [Request([*q.turns, _LEAD], str(score)) for q in group for score in _scale(q)]
            log_probs = iter(answer_log_probs(self._view, self._lm.tokenizer, requests, what="scores").before)
            for number, question in enumerate(group, start):
                keep(number, read({score: next(log_probs) for score in _scale(question)}, self._reading))


def _scale(question: JudgeQuestion) -> range:
    return range(question.low, question.high + 1)


def read(log_probs: dict[int, float], reading: Reading) -> Verdict:
    """The score under the log-probabilities of the scale's numbers; of equal ones the lower number counts as the likeliest."""
    highest = max(log_probs, key=log_probs.__getitem__)
    weights = {score: math.exp(value - log_probs[highest]) for score, value in log_probs.items()}
    total = sum(weights.values())
    if not math.isfinite(total):
        return Verdict(None, "its log-probabilities are not finite numbers")
    expected = sum(score * weight for score, weight in weights.items()) / total
    shares = ", ".join(f"{score}: {weight / total:.4f}" for score, weight in weights.items())
    return Verdict(expected if reading == "expected" else float(highest), shares)
