"""The judges of a run: who they are and how those behind an endpoint are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.endpoint import EndpointJudge, key_from
from bad_neurons.evaluation.judged.judge import Judge, ask_judge
from bad_neurons.evaluation.judged.local import LocalJudge, Reading
from bad_neurons.evaluation.judged.tests import JudgeQuestion
from bad_neurons.models.load import Dtype, load_model

LOCAL = "local:"


@dataclass(frozen=True)
class Panel:
    """The judges and how they are asked. With several, an answer's score is their median, as published.

    Args:
        judges: each a model's name at the endpoint, or ``local:`` and a model on this machine (``local:packaged:gemma-3-270m``).
        base_url: address of the OpenAI-compatible endpoint.
        key_variable: environment variable with the endpoint's API key; where it is not set, none is sent.
        timeout: seconds for one reply of the endpoint.
        attempts: how often a question is tried while the endpoint fails.
        per_minute: requests a minute to each judge at the endpoint at most; 0 means no limit.
        at_once: questions that are on their way to the endpoint at the same time.
        temperature: of judges at the endpoint; null leaves it to the endpoint, which some models need.
        reading: score of a local judge: the ``expected`` one under its probabilities, or the ``likeliest``.
        judge_dtype: dtype of local judges.
    """

    judges: list[str]
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 6
    per_minute: float = 0.0
    at_once: int = 4
    temperature: float | None = 0.0
    reading: Reading = "expected"
    judge_dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if not self.judges or len(set(self.judges)) < len(self.judges):
            raise UserError(f"--judges {self.judges}: one judge or more, each of them once, such as local:packaged:gemma-3-270m")
        for name in ("timeout", "attempts", "at_once"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: above 0")
        if self.per_minute < 0:
            raise UserError(f"--per_minute {self.per_minute}: requests a minute, or 0 for no limit")
        for spec in self.judges:
            if not spec.startswith(LOCAL):
                self._endpoint(spec)  # refuses a bad address or key before anything is computed

    def scores(self, questions: Sequence[JudgeQuestion], kept: Kept) -> dict[str, list[float | None]]:
        """Scores of every question, by judge. One judge is asked after the other, and only one local model is loaded at a time.

        Args:
            questions: what to ask.
            kept: verdicts of earlier runs, and of this one.

        Raises:
            UserError: a judge that cannot be had or that gives no score at all.
        """
        found: dict[str, list[float | None]] = {}
        for spec in self.judges:
            judge = self._judge(spec)
            found[judge.name] = ask_judge(judge, questions, kept)
        return found

    def _judge(self, spec: str) -> Judge:
        if spec.startswith(LOCAL):
            return LocalJudge(load_model(spec.removeprefix(LOCAL), self.judge_dtype), self.reading)
        return self._endpoint(spec)

    def _endpoint(self, model: str) -> EndpointJudge:
        key = key_from(self.key_variable)
        return EndpointJudge(model, self.base_url, key, self.timeout, self.attempts, self.per_minute, self.at_once, self.temperature)
