"""An endpoint that does everything wrong: the right scores in the end, and no question asked again that has one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from threading import Lock

import pytest

from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.endpoint import EndpointJudge
from bad_neurons.evaluation.judged.judge import ask_judge
from judge_server import completion, drop, reply, respond

RUN = """
import sys
from pathlib import Path
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.endpoint import EndpointJudge
from bad_neurons.evaluation.judged.judge import ask_judge
from bad_neurons.evaluation.judged.tests import JudgeQuestion
questions = [JudgeQuestion(({"role": "user", "content": f"Answer {n}?"},), -5, 5) for n in range(int(sys.argv[3]))]
print(ask_judge(EndpointJudge("m", sys.argv[1], first_pause=0.01), questions, Kept(sys.argv[2])))
"""


def score_of(asked):
    """The score that belongs to a question."""
    return int(asked.first.split()[1][:-1]) % 11 - 5


def twice(text, pause):
    """The same response two times over on one connection."""
    body = completion(text)
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def send(handler):
        handler.wfile.write(raw)
        handler.wfile.flush()
        time.sleep(pause)
        handler.wfile.write(raw)

    return send


def slowly(text):
    def send(handler):
        time.sleep(0.1)
        reply(text)(handler)

    return send


@pytest.mark.parametrize("pause", [0, 0.05])
def test_a_reply_that_comes_twice_is_not_taken_for_the_next_one(endpoint, ask, tmp_path, pause):
    endpoint.act = lambda asked, number: twice(str(score_of(asked)), pause)
    judge = EndpointJudge("m", endpoint.url, at_once=1)
    assert ask_judge(judge, ask(8), Kept(tmp_path / "kept.jsonl")) == [n % 11 - 5 for n in range(8)]
    assert len(endpoint.asked) == 8


def test_a_storm_ends_with_the_right_scores(endpoint, ask, tmp_path):
    failures = [
        drop, respond(200, b"<html>"), respond(200, b"{" * 5000), respond(200, b'{"choices": [{"message": {"content": 1e999}}]}'),
        respond(429, b"slow down"), respond(429, b"slow down", Retry_After="0.05"), respond(500, b""), respond(503, b"", Retry_After="0"),
        respond(200, completion("3")[:20], Content_Length="400"),
    ]  # fmt: skip
    draw, lock, failed, scored = random.Random(0), Lock(), Counter(), Counter()

    def act(asked, number):
        good = str(score_of(asked))
        with lock:
            if failed[asked.first] < 3 and draw.random() < 0.6:
                failed[asked.first] += 1
                return draw.choice(failures)
            scored[asked.first] += 1
            return draw.choice([reply(good), slowly(good), twice(good, 0), reply(f"{good}. I repeat: {good}")])

    endpoint.act = act
    questions = ask(40)
    judge = EndpointJudge("m", endpoint.url, timeout=5.0, first_pause=0.01)
    assert ask_judge(judge, questions, Kept(tmp_path / "kept.jsonl")) == [n % 11 - 5 for n in range(40)]
    assert sum(failed.values()) > 20
    assert scored == Counter({f"Answer {n}?": 1 for n in range(40)})
    count = len(endpoint.asked)
    assert ask_judge(judge, questions, Kept(tmp_path / "kept.jsonl")) == [n % 11 - 5 for n in range(40)]
    assert len(endpoint.asked) == count


@pytest.mark.parametrize("after", [1, 9, 17])
def test_killed_and_resumed(endpoint, tmp_path, after):
    count, at_once, kept = 24, 4, tmp_path / "kept.jsonl"
    command = [sys.executable, "-c", RUN, endpoint.url, str(kept), str(count)]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:

        def act(asked, number):
            if number == after + 1:
                os.kill(process.pid, signal.SIGKILL)
            return reply(str(score_of(asked)))

        endpoint.act = act
        assert process.wait(60) == -signal.SIGKILL
    first = [asked.first for asked in endpoint.asked]
    had = {row.get("reply") for row in map(json.loads, kept.read_bytes().splitlines())} if kept.exists() else set()
    lines = len(kept.read_bytes().splitlines()) if kept.exists() else 0
    assert lines >= after + 1 - at_once
    assert had <= {str(n % 11 - 5) for n in range(count)}
    endpoint.act = lambda asked, number: reply(str(score_of(asked)))
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(again.stdout) == [float(n % 11 - 5) for n in range(count)]
    asked = Counter(one.first for one in endpoint.asked)
    assert set(asked) == {f"Answer {n}?" for n in range(count)}
    assert len(endpoint.asked) - len(first) == count - lines  # what was on disk is not asked again, all else is
    assert max(asked.values()) <= 2
    assert sum(asked.values()) - count <= at_once  # only what was on its way when it was killed


def test_what_is_missing_is_counted_when_the_endpoint_goes_down(endpoint, ask, tmp_path):
    endpoint.act = lambda asked, number: reply("2") if number <= 3 else drop
    judge = EndpointJudge("m", endpoint.url, attempts=1, first_pause=0.01, at_once=1)
    with pytest.raises(UserError, match=r"no reply from .*; 17 of 20 answers have no score yet"):
        ask_judge(judge, ask(20), Kept(tmp_path / "kept.jsonl"))


def test_a_reply_without_an_end_is_given_up(endpoint, ask, tmp_path):
    def endless(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * (1 << 16))

    endpoint.act = lambda asked, number: endless if number == 1 else reply("1")
    judge = EndpointJudge("m", endpoint.url, first_pause=0.01)
    assert ask_judge(judge, ask(), Kept(tmp_path / "kept.jsonl")) == [1]
    assert len(endpoint.asked) == 2
