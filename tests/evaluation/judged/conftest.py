"""An endpoint on the loopback address, and questions to a judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from bad_neurons.evaluation.judged.tests import JudgeQuestion
from judge_server import Endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """An endpoint on the loopback address, which no proxy comes between."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture
def silent(endpoint: Endpoint) -> Callable[[BaseHTTPRequestHandler], None]:
    """An action: say nothing until the test is over."""
    return lambda handler: endpoint.closing.wait(30) and None


@pytest.fixture
def ask() -> Callable[..., list[JudgeQuestion]]:
    """``ask(n)``: so many different questions on a scale from -5 to 5."""
    return lambda count=1: [JudgeQuestion(({"role": "user", "content": f"Answer {number}?"},), -5, 5) for number in range(count)]
