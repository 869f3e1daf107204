"""A judge behind an OpenAI-compatible endpoint: ``POST <address>/chat/completions``.

What passes (no answer in time, a dropped connection, status 408, 429 or 5xx, a body that is not the format's) is tried again
with growing pauses, or after the pause that the endpoint asks for (``Retry-After``). What does not pass (a wrong key, an
unknown model) ends the run with one line. A single prompt that the endpoint refuses costs its own score alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import Any

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt, wait_exponential, wait_random

from bad_neurons.artifacts import digest_json
from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.judge import Verdict, parse_score
from bad_neurons.evaluation.judged.tests import JudgeQuestion
from bad_neurons.models.prompts import Turn
from bad_neurons.reading import parse_json

_ASKED = 3  # times that a judge is asked for a number before its reply counts as none
_DOWN = 5  # questions in a row without any reply after which the endpoint counts as down
_LONGEST = 600.0  # seconds of a pause that is waited for
_BYTES = 1 << 22  # of a reply at most
# A connection for each request: what an endpoint sends twice on a shared one would be taken for the reply to the next question.
_ONE_EACH = httpx2.Limits(max_keepalive_connections=0)
_FINAL = {401: "the key is wrong", 402: "the account is empty", 404: "no such address or model", 405: "no such address"}


class _Passing(Exception):  # noqa: N818 (not an error of ours)
    """A failure that may pass; ``pause`` is what the endpoint asks for, in seconds, or 0."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class _Refused(Exception):  # noqa: N818 (not an error of ours)
    """The endpoint does not answer this one prompt."""


class _Stopped(Exception):  # noqa: N818 (not an error of ours)
    """The run ends while this question waits."""


class EndpointJudge:
    """A model behind an endpoint.

    Args:
        model: its name there.
        base_url: the endpoint's address, up to and with ``/v1``.
        key: the API key; None sends none.
        timeout: seconds for one reply, from asking to its last byte.
        attempts: how often a question is tried before it counts as failed.
        per_minute: requests a minute at most; 0 means no limit.
        at_once: questions that are on their way at the same time.
        temperature: of the judge; None leaves it to the endpoint.
        first_pause: seconds before the second attempt; each further pause is twice as long, up to a minute.

    Raises:
        UserError: an address or a key that cannot be one.
    """

    together = 1

    def __init__(
        self,
        model: str,
        base_url: str,
        key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 6,
        per_minute: float = 0.0,
        at_once: int = 4,
        temperature: float | None = 0.0,
        first_pause: float = 1.0,
    ) -> None:
        self.name, self._url = model, _completions(base_url)
        self.key = digest_json(["endpoint", self._url, model, temperature])
        self._key, self._timeout, self._temperature = _checked(key), timeout, temperature
        self._at_once, self._stop = at_once, Event()
        self._pace = _Pace(per_minute, self._stop)
        self._pauses = wait_exponential(multiplier=first_pause, max=60.0) + wait_random(0.0, first_pause)
        self._retrying = Retrying(
            stop=stop_after_attempt(attempts), wait=self._pause, retry=retry_if_exception_type(_Passing),
            sleep=sleep_using_event(self._stop), reraise=True,
        )  # fmt: skip

    def ask(self, questions: Sequence[JudgeQuestion], keep: Callable[[int, Verdict], None]) -> None:
        """Ask all questions, some at once.

        Raises:
            UserError: the endpoint turns the judge away or is down.
        """
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._stop.clear()
        with (
            httpx2.Client(headers=headers, timeout=self._timeout, limits=_ONE_EACH) as client,
            ThreadPoolExecutor(self._at_once) as workers,
        ):
            futures = [workers.submit(self._one, client, number, question, keep) for number, question in enumerate(questions)]
            silent = 0
            try:
                for future in as_completed(futures):
                    why = future.result()
                    silent = silent + 1 if why else 0
                    if silent == _DOWN:
                        raise UserError(
                            f"judge {self.name}: no reply from {self._url} ({why}); what it replied is kept, the same command goes on"
                        )
            except BaseException:
                self._stop.set()
                workers.shutdown(wait=False, cancel_futures=True)
                raise

    def _one(self, client: httpx2.Client, number: int, question: JudgeQuestion, keep: Callable[[int, Verdict], None]) -> str:
        """Ask one question and hand its verdict on; gives why there was no reply at all, or nothing."""
        try:
            keep(number, self._verdict(client, question))
        except _Refused as error:
            keep(number, Verdict(None, str(error)))
        except _Passing as error:
            keep(number, Verdict(None, str(error)))
            return str(error)
        except _Stopped:
            pass
        except BaseException:
            self._stop.set()  # before this thread takes the next question
            raise
        return ""

    def _verdict(self, client: httpx2.Client, question: JudgeQuestion) -> Verdict:
        turns, reply = list(question.turns), ""
        reminder = f"Reply with one whole number from {question.low} to {question.high} and nothing else."
        for _ in range(_ASKED):
            reply = self._retrying(self._reply, client, turns)
            score = parse_score(reply, question.low, question.high)
            if score is not None:
                return Verdict(float(score), reply)
            said: list[Turn] = [{"role": "assistant", "content": reply}] if reply.strip() else []
            turns = [*question.turns, *said, {"role": "user", "content": reminder}]
        return Verdict(None, reply)

    def _reply(self, client: httpx2.Client, turns: Sequence[Turn]) -> str:
        """One request, one reply."""
        self._pace.wait()
        payload: dict[str, Any] = {"model": self.name, "messages": turns}
        if self._temperature is not None:
            payload["temperature"] = self._temperature
        end = time.monotonic() + self._timeout
        try:
            with client.stream("POST", self._url, json=payload) as response:
                body, late = bytearray(), False
                for part in response.iter_bytes():  # endpoints keep a connection alive with blanks, so no single read is slow
                    if late:
                        raise _Passing(f"not whole after {self._timeout:g} s")
                    body += part
                    if len(body) > _BYTES:
                        raise _Passing(f"more than {_BYTES:,} bytes")
                    late = time.monotonic() > end
        except httpx2.TimeoutException as error:
            raise _Passing(f"nothing within {self._timeout:g} s") from error
        except httpx2.RequestError as error:
            raise _Passing(self._safe(f"{type(error).__name__}: {error}")) from error
        self._check(response, bytes(body))
        try:
            return self._hidden(_content(bytes(body)))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Passing(f"a body that is no chat completion: {self._start(body)}") from error

    def _check(self, response: httpx2.Response, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = f"HTTP {status}: {self._start(body)}"
        if status in (408, 429) or status >= 500:
            pause = _retry_after(response.headers.get("Retry-After", ""))
            if pause > _LONGEST:
                raise UserError(f"judge {self.name}: asks to be left alone for {pause:.0f} s ({said}); the same command goes on after that")
            if status == 429:
                self._pace.hold(pause)
            raise _Passing(said, pause)
        if status in _FINAL or status < 400:
            raise UserError(f"judge {self.name} at {self._url}: {_FINAL.get(status, 'it is not there')} ({said})")
        raise _Refused(said)

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(self._pauses(state), error.pause if isinstance(error, _Passing) else 0.0)

    def _start(self, body: bytes | bytearray) -> str:
        return self._safe(body.decode("utf-8", "replace"))[:200]

    def _safe(self, text: str) -> str:
        """``text`` on one line, without the key, should an endpoint or a library repeat it."""
        return " ".join(self._hidden(text).split())

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Pace:
    """When the next request may start; shared by all threads of a judge."""

    def __init__(self, per_minute: float, stop: Event) -> None:
        self._step = 60.0 / per_minute if per_minute else 0.0
        self._stop, self._lock, self._next = stop, Lock(), 0.0

    def wait(self) -> None:
        """Return when it is this request's turn."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._step
        if self._stop.wait(max(0.0, start - time.monotonic())):
            raise _Stopped

    def hold(self, seconds: float) -> None:
        """No request starts within ``seconds`` from now."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def key_from(variable: str) -> str | None:
    """The API key in an environment variable, or None where it is not set."""
    return os.environ.get(variable, "").strip() or None


def _checked(key: str | None) -> str | None:
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("API key: holds a blank or a character that no key has; set its environment variable to the key alone")
    return key


def _completions(base_url: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise UserError(f"--base_url {base_url!r}: {error}; expected an address like https://api.openai.com/v1") from error
    if url.userinfo:
        raise UserError("--base_url: holds a name or a password; expected an address alone, with the key in an environment variable")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--base_url {base_url!r}: expected an address like https://api.openai.com/v1")
    return f"{base_url.rstrip('/')}/chat/completions"


def _retry_after(value: str) -> float:
    """Seconds to wait by a Retry-After header: a number of them, or a date (RFC 9110 section 10.2.3); 0 where it is neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)  # "-0000": a time in UTC from an unknown place
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError):
        return 0.0


def _content(body: bytes) -> str:
    """The text of the first choice; empty where the judge said nothing."""
    content = parse_json(body.decode())["choices"][0]["message"]["content"]
    return content if isinstance(content, str) else ""
