"""A judge behind an endpoint, over real HTTP on the loopback address: every failure, and what is asked how often."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Event

import pytest

from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.endpoint import EndpointJudge, _Pace, _retry_after, _Stopped, key_from
from bad_neurons.evaluation.judged.judge import ask_judge
from judge_server import completion, drop, reply, respond

KEY = "sk-not-to-be-seen"


def drip(handler):
    """A blank now and then keeps the connection alive, and no reply ever comes."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.fixture
def judge(endpoint):
    """``judge(**options)``: a judge at the endpoint that loses no time."""
    return lambda **options: EndpointJudge("judge-1", endpoint.url, **{"key": KEY, "timeout": 5.0, "first_pause": 0.01, **options})


@pytest.fixture
def verdicts():
    """``verdicts(judge, questions)``: the verdict on each question, in order; one for each of them."""

    def asked(judge, questions):
        found = {}

        def keep(number, verdict):
            assert number not in found
            found[number] = verdict

        judge.ask(questions, keep)
        return [found[number] for number in range(len(questions))]

    return asked


def test_request_and_reply(endpoint, judge, ask, verdicts):
    endpoint.act = lambda asked, number: str(int(asked.first.split()[1][:-1]) - 2)
    assert [v.score for v in verdicts(judge(at_once=3), ask(6))] == [-2, -1, 0, 1, 2, 3]
    first = min(endpoint.asked, key=lambda asked: asked.first)
    assert (first.path, first.key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert first.payload == {"model": "judge-1", "temperature": 0.0, "messages": [{"role": "user", "content": "Answer 0?"}]}
    assert len(endpoint.asked) == 6


def test_without_key_and_temperature(endpoint, judge, ask, verdicts):
    verdicts(judge(key=None, temperature=None), ask())
    assert endpoint.asked[0].key is None
    assert set(endpoint.asked[0].payload) == {"model", "messages"}


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(drop, id="dropped"),
        pytest.param(respond(200, b"<html>busy</html>"), id="no JSON"),
        pytest.param(respond(200, b'{"error": {"message": "overloaded"}}'), id="no choices"),
        pytest.param(respond(200, b'{"choices": []}'), id="empty choices"),
        pytest.param(respond(200, b"[1"), id="half of JSON"),
        pytest.param(respond(200, b"\xff\xfe\x00"), id="no text"),
        pytest.param(respond(200, completion("3")[:20], Content_Length="400"), id="body cut short"),
        *(pytest.param(respond(status, b"no"), id=str(status)) for status in (408, 429, 500, 502, 503, 529)),
    ],
)
def test_what_passes_is_tried_again(endpoint, judge, ask, verdicts, failure):
    endpoint.act = lambda asked, number: failure if number <= 2 else "3"
    assert [v.score for v in verdicts(judge(timeout=1.0), ask())] == [3]
    assert len(endpoint.asked) == 3


def test_a_slow_reply_is_given_up(endpoint, judge, ask, verdicts, silent):
    endpoint.act = lambda asked, number: silent if number == 1 else "4"
    assert verdicts(judge(timeout=0.3), ask())[0].score == 4
    assert len(endpoint.asked) == 2


def test_a_reply_that_never_ends_is_given_up(endpoint, judge, ask, verdicts):
    endpoint.act = lambda asked, number: drip if number == 1 else "4"
    assert verdicts(judge(timeout=0.4), ask())[0].score == 4
    assert len(endpoint.asked) == 2
    assert 0.4 <= endpoint.asked[1].at - endpoint.asked[0].at < 3


def test_a_reply_whose_end_comes_late_counts(endpoint, judge, ask, verdicts):
    def late(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(completion("4")) + 1))
        handler.end_headers()
        for part in (b" ", completion("4")):  # each within the time of one read, both together beyond it
            time.sleep(1.2)
            handler.wfile.write(part)

    endpoint.act = lambda asked, number: late
    assert verdicts(judge(timeout=2.0), ask())[0].score == 4
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_the_pause_that_is_asked_for_is_kept(endpoint, judge, ask, verdicts, status):
    endpoint.act = lambda asked, number: respond(status, b"", Retry_After="0.5") if number == 1 else "1"
    assert verdicts(judge(), ask())[0].score == 1
    assert endpoint.asked[1].at - endpoint.asked[0].at >= 0.5


def test_pauses_grow(endpoint, judge, ask, verdicts):
    endpoint.act = lambda asked, number: respond(500, b"") if number < 4 else "1"
    assert verdicts(judge(first_pause=0.1), ask())[0].score == 1
    pauses = [b.at - a.at for a, b in zip(endpoint.asked, endpoint.asked[1:], strict=False)]
    assert [pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True)] == [True] * 3


def test_the_header_as_seconds_and_as_a_date():
    assert _retry_after("7") == 7
    assert 25 < _retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)) <= 30
    assert [_retry_after(value) for value in ("", "soon", "-3", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 -0000")] == [
        0.0
    ] * 5


def test_a_pause_of_hours_ends_the_run(endpoint, judge, ask, verdicts):
    endpoint.act = lambda asked, number: respond(429, b"quota", Retry_After="7200")
    with pytest.raises(UserError, match=r"asks to be left alone for 7200 s \(HTTP 429: quota\); the same command goes on"):
        verdicts(judge(at_once=1), ask(3))
    assert len(endpoint.asked) == 1


def test_an_endpoint_that_is_down_ends_the_run(endpoint, judge, ask, verdicts):
    endpoint.act = lambda asked, number: "2" if asked.first == "Answer 0?" else respond(503, b"maintenance")
    with pytest.raises(UserError, match=r"judge judge-1: no reply from http://127.*\(HTTP 503: maintenance\); what it replied is kept"):
        verdicts(judge(at_once=1, attempts=2), ask(20))
    counts = Counter(asked.first for asked in endpoint.asked)
    assert list(counts.values())[:6] == [1, 2, 2, 2, 2, 2]
    assert len(counts) <= 7  # one may have been on its way when the fifth failed


def test_nobody_listens(judge, ask, verdicts, endpoint):
    endpoint.close()
    with pytest.raises(UserError, match=r"no reply from .*ConnectError"):
        verdicts(judge(attempts=2), ask(6))


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "the key is wrong"), (402, "the account is empty"), (404, "no such address or model"), (302, "it is not there")],
)
def test_what_does_not_pass_ends_the_run_at_once(endpoint, judge, ask, verdicts, status, words):
    endpoint.act = lambda asked, number: respond(status, f"you sent {KEY}".encode())
    with pytest.raises(UserError, match=f"{words} \\(HTTP {status}: you sent \\*\\*\\*\\)"):
        verdicts(judge(at_once=1), ask(9))
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_refused_prompt_costs_its_own_score_alone(endpoint, judge, ask, verdicts, status):
    endpoint.act = lambda asked, number: respond(status, b"filtered") if asked.first == "Answer 1?" else "5"
    found = verdicts(judge(), ask(4))
    assert [v.score for v in found] == [5, None, 5, 5]
    assert found[1].reply == f"HTTP {status}: filtered"
    assert len(endpoint.asked) == 4


def test_a_reply_that_is_no_score_is_asked_for_again(endpoint, judge, ask, verdicts):
    replies = ["9", "Between 2 and 3.", "3, so 3"]
    endpoint.act = lambda asked, number: replies[number - 1]
    found = verdicts(judge(), ask())[0]
    assert (found.score, found.reply) == (3, "3, so 3")
    reminder = {"role": "user", "content": "Reply with one whole number from -5 to 5 and nothing else."}
    assert [asked.payload["messages"][1:] for asked in endpoint.asked] == [
        [],
        [{"role": "assistant", "content": "9"}, reminder],
        [{"role": "assistant", "content": "Between 2 and 3."}, reminder],
    ]


def test_a_judge_that_gives_no_score_is_left_alone_after_three(endpoint, judge, ask, verdicts):
    endpoint.act = lambda asked, number: "" if asked.first == "Answer 0?" else "-4"
    assert [(v.score, v.reply) for v in verdicts(judge(), ask(2))] == [(None, ""), (-4, "-4")]
    counts = Counter(asked.first for asked in endpoint.asked)
    assert counts == {"Answer 0?": 3, "Answer 1?": 1}
    roles = {tuple(turn["role"] for turn in asked.payload["messages"]) for asked in endpoint.asked}
    assert roles == {("user",), ("user", "user")}  # nothing was said, so nothing is repeated


def test_requests_keep_their_distance(endpoint, judge, ask, verdicts):
    start = time.monotonic()
    verdicts(judge(per_minute=600, at_once=4), ask(5))
    assert max(asked.at for asked in endpoint.asked) - start >= 0.4  # four steps of 0.1 s


def test_all_threads_wait_while_one_is_told_to():
    pace = _Pace(0, Event())
    start = time.monotonic()
    pace.wait()
    assert time.monotonic() - start < 0.2
    pace.hold(0.3)
    pace.wait()
    assert time.monotonic() - start >= 0.3


def test_nobody_waits_once_the_run_ends():
    stop = Event()
    pace = _Pace(0, stop)
    pace.hold(60)
    stop.set()
    with pytest.raises(_Stopped):
        pace.wait()


def test_a_stop_asks_no_more(endpoint, judge, ask):
    def keep(number, verdict):
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(at_once=1).ask(ask(50), keep)
    assert len(endpoint.asked) == 2


def test_the_key_is_nowhere(endpoint, judge, ask, tmp_path, caplog, capfd):
    acts = [respond(500, f"Bearer {KEY}".encode()), reply(f"your key {KEY}"), reply("2"), respond(400, KEY.encode()), reply("1")]
    endpoint.act = lambda asked, number: acts[number - 1]
    with caplog.at_level("DEBUG"):
        assert ask_judge(judge(at_once=1), ask(3), Kept(tmp_path / "kept.jsonl")) == [2, None, 1]
    assert all(asked.key == f"Bearer {KEY}" for asked in endpoint.asked)
    sent = [turn["content"] for asked in endpoint.asked for turn in asked.payload["messages"]]
    said = "".join([caplog.text, *capfd.readouterr(), *sent, *(path.read_text() for path in tmp_path.rglob("*"))])
    assert "***" in said
    assert KEY not in said
    assert KEY not in repr(judge())


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert key_from("SOME_KEY") == KEY
    monkeypatch.setenv("SOME_KEY", "")
    assert key_from("SOME_KEY") is None
    assert key_from("NO_SUCH_KEY") is None


def test_bad_addresses_and_keys():
    for url in ("api.openai.com/v1", "ftp://host/v1", "https://", "http://[::1", ""):
        with pytest.raises(UserError, match="expected an address"):
            EndpointJudge("m", url)
    with pytest.raises(UserError, match="holds a name or a password") as caught:
        EndpointJudge("m", f"https://user:{KEY}@host/v1")
    assert KEY not in str(caught.value)
    for key in ("sk-1 sk-2", "sk-1\nX-Other: 1", "sk-ü"):
        with pytest.raises(UserError, match="no key has") as caught:
            EndpointJudge("m", "https://host/v1", key)
        assert key not in str(caught.value)


def test_verdicts_are_kept_under_all_they_depend_on():
    base = EndpointJudge("m", "https://host/v1", "k1").key
    assert base == EndpointJudge("m", "https://host/v1/", "k2", timeout=1, attempts=2, per_minute=3, at_once=5).key
    others = [
        EndpointJudge("n", "https://host/v1"),
        EndpointJudge("m", "https://other/v1"),
        EndpointJudge("m", "https://host/v1", temperature=None),
    ]
    assert len({base, *(other.key for other in others)}) == 4
