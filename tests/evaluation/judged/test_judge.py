"""Reading scores, and that no question that was answered is asked again."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections import Counter
from threading import Event

import pytest

from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.cache import Kept
from bad_neurons.evaluation.judged.endpoint import EndpointJudge
from bad_neurons.evaluation.judged.judge import Verdict, ask_judge, parse_score
from bad_neurons.evaluation.judged.tests import JudgeQuestion


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("3", 3), (" -5\n", -5), ("+2", 2), ("0", 0), ("-0", 0), ("3.0", 3), ("Score: 4.", 4), ("**-2**", -2),
        ("\u22123", -3), ("\u20134", -4),
        ("3 3", 3), ("4, so 4", 4), ("<think>5 or 2? -1</think>\n1", 1),
        ("6", None), ("-6", None), ("10", None), ("2.5", None), ("", None), ("three", None), ("2 or 3", None), ("2-3", None), ("4/5", None),
        ("4 out of 5", None), ("<think>it is 2", None), ("1e3", None), ("9" * 400, None),
    ],
)  # fmt: skip
def test_the_one_number_of_a_reply(reply, score):
    assert parse_score(reply, -5, 5) == score


def test_scale_of_delusion_has_no_negative_numbers():
    assert parse_score("-1", 0, 5) is None
    assert parse_score("5", 0, 5) == 5


class Scripted:
    """A judge that gives each question the score at the end of its text, and counts."""

    def __init__(self, key="k", together=1):
        self.name, self.key, self.together, self.asked = "scripted", key, together, []

    def ask(self, questions, keep):
        self.asked.append([q.turns[0]["content"] for q in questions])
        for number, question in reversed(list(enumerate(questions))):
            score = question.turns[0]["content"].split()[-1]
            keep(number, Verdict(None if score == "-" else float(score), f"said {score}"))


def questions(*texts, high=5):
    return [JudgeQuestion(({"role": "user", "content": text},), -5, high) for text in texts]


def test_each_question_is_asked_once_and_never_again(tmp_path):
    judge, kept = Scripted(), Kept(tmp_path / "kept.jsonl")
    assert ask_judge(judge, questions("a 1", "b 2", "a 1", "c 3"), kept) == [1, 2, 1, 3]
    assert ask_judge(judge, questions("c 3", "d 4", "a 1"), Kept(tmp_path / "kept.jsonl")) == [3, 4, 1]
    assert judge.asked == [["a 1", "b 2", "c 3"], ["d 4"]]
    assert ask_judge(judge, questions("c 3"), Kept(tmp_path / "kept.jsonl")) == [3]
    assert len(judge.asked) == 2


def test_another_judge_and_another_scale_are_other_questions(tmp_path):
    path = tmp_path / "kept.jsonl"
    ask_judge(Scripted(), questions("a 1"), Kept(path))
    other = Scripted("other")
    assert ask_judge(other, questions("a 1"), Kept(path)) == [1]
    wider = Scripted()
    assert ask_judge(wider, questions("a 1", high=6), Kept(path)) == [1]
    assert (other.asked, wider.asked) == ([["a 1"]], [["a 1"]])
    assert len(path.read_text().splitlines()) == 3


def test_what_is_asked_together_stays_together(tmp_path):
    path = tmp_path / "kept.jsonl"
    texts = [f"q {number % 5}" for number in range(5)] + ["r 1", "s 2", "t 3"]
    first = Scripted(together=3)
    ask_judge(first, questions(*texts), Kept(path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(  # as a kill would leave it
        "".join(line for line in lines if "said 4" not in line)
    )
    again = Scripted(together=3)
    assert ask_judge(again, questions(*texts), Kept(path)) == [0, 1, 2, 3, 4, 1, 2, 3]
    assert again.asked == [texts[3:6]]
    assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines())


def test_without_a_score(tmp_path, caplog):
    judge, kept = Scripted(), Kept(tmp_path / "kept.jsonl")
    assert ask_judge(judge, questions("a 1", "b -", "c 2"), kept) == [1, None, 2]
    assert "judge scripted: no score for 1 of 3 answers, which the same command asks again; it replied: said -" in caplog.text
    assert ask_judge(judge, questions("a 1", "b -"), kept) == [1, None]
    assert judge.asked[1] == ["b -"]
    with pytest.raises(UserError, match="judge scripted: no score for any of 2 answers; it replied: said -"):
        ask_judge(judge, questions("d -", "e -"), kept)


def test_a_killed_run_goes_on_where_it_was(endpoint, silent, tmp_path):
    """SIGKILL while the fourth question is on its way; then the rest, each answered question asked exactly once in all."""
    fourth = Event()

    def act(asked, number):
        if number == 4:
            fourth.set()
            return silent
        return str(number)

    endpoint.act = act
    path = tmp_path / "kept.jsonl"
    script = f"""
        from bad_neurons.evaluation.judged.cache import Kept
        from bad_neurons.evaluation.judged.endpoint import EndpointJudge
        from bad_neurons.evaluation.judged.judge import ask_judge
        from bad_neurons.evaluation.judged.tests import JudgeQuestion
        questions = [JudgeQuestion(({{"role": "user", "content": f"q{{i}}"}},), 0, 99) for i in range(8)]
        ask_judge(EndpointJudge("m", {endpoint.url!r}, at_once=1), questions, Kept({str(path)!r}))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    assert fourth.wait(60)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(path.read_bytes().splitlines()) == 3
    with open(path, "ab") as handle:
        handle.write(b'{"key": "torn')

    scores = ask_judge(
        EndpointJudge("m", endpoint.url, at_once=2),
        [q._replace(low=0, high=99) for q in questions(*(f"q{i}" for i in range(8)))],
        Kept(path),
    )
    assert scores[:3] == [1, 2, 3]
    assert sorted(scores[3:]) == [5, 6, 7, 8, 9]
    assert Counter(asked.first for asked in endpoint.asked) == {f"q{i}": 2 if i == 3 else 1 for i in range(8)}


def test_a_score_is_kept_before_the_next_question_is_asked(endpoint, tmp_path):
    path = tmp_path / "kept.jsonl"
    there = []

    def act(asked, number):
        there.append(len(path.read_bytes().splitlines()) if path.exists() else 0)
        return "1"

    endpoint.act = act
    ask_judge(EndpointJudge("m", endpoint.url, at_once=1), questions("a", "b", "c"), Kept(path))
    assert there == [0, 1, 2]
