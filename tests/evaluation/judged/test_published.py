"""Published answers: their columns, and the published numbers of six models from them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.numbers import Scored, summarise
from bad_neurons.evaluation.judged.published import read_published
from bad_neurons.evaluation.judged.tests import TESTS, median_score

DATA = Path(os.environ.get("BAD_NEURONS_DATA") or Path(__file__).parents[3].parent / "shared" / "data") / "syco-bench" / "judged"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no published judgements in {DATA} (set BAD_NEURONS_DATA)")

# The benchmark's own master_results.csv of each model: pickside, mirror, whosaid (difference, self, friend), delusion.
PUBLISHED = {
    "OpenAI ChatGPT 4o w/ system prompt": (0.925, 3.175, 0.725, 3.125, 2.4, 2.55),
    "Anthropic Claude 3 Opus w/ system prompt": (2.0, 1.925, 0.15, 0.85, 0.7, 1.0),
    "Anthropic Claude 3.7 Sonnet Thinking w/ system prompt": (2.475, 1.025, 1.125, 2.0, 0.875, 2.1),
    "Anthropic Claude 3.7 Sonnet Thinking w/o system prompt": (1.3, 1.175, 0.8, 1.15, 0.35, 1.55),
    "Anthropic Claude 3.7 Sonnet w/ system prompt": (1.85, 1.475, 0.85, 2.075, 1.225, 1.5),
    "Anthropic Claude 3.5 Haiku w/o system prompt": (1.125, 1.35, 0.475, 1.4, 0.925, 1.05),
}


@real
def test_published_numbers_come_out():
    answers = {test: read_published(test, DATA) for test in TESTS}
    for model, numbers in PUBLISHED.items():
        found = {
            test: summarise(test, [Scored(a.topic, a.item.side, a.median) for a in of_test if a.model == model])
            for test, of_test in answers.items()
        }
        assert [found[test]["n"] for test in TESTS] == [40, 40, 40, 20]
        whosaid = found["whosaid"]["sides"]
        means = [*(found[test]["number"] for test in ("pickside", "mirror", "whosaid")), whosaid["self"], whosaid["friend"]]
        assert [m["mean"] for m in (*means, found["delusion"]["number"])] == pytest.approx(numbers, abs=1e-9), model


@real
def test_published_medians_are_those_of_the_published_scores():
    for test in TESTS:
        answers = read_published(test, DATA)
        assert Counter(a.model for a in answers) == dict.fromkeys(PUBLISHED, (20 if test == "delusion" else 40) * len(TESTS[test].sides))
        assert [median_score(a.scores) for a in answers] == [a.median for a in answers]


ROW = 'm,tea is best,coffee is best,Yes.,No.,"[1.0, None, 3.0]","[0, -5, nan]",2.0,-2.5\n'
HEAD = "Name,statement1,statement2,response1,response2,judge1_scores,judge2_scores,score1,score2\n"


def test_a_row_is_one_answer_a_side(tmp_path):
    (tmp_path / "pickside.csv").write_text(HEAD + ROW)
    first, second = read_published("pickside", tmp_path)
    assert (first.model, first.answer, first.scores, first.median) == ("m", "Yes.", (1, None, 3), 2)
    assert (second.answer, second.scores, second.median) == ("No.", (0, -5, None), -2.5)
    assert "I'm saying that coffee is best" in second.item.prompt
    assert first.topic == second.topic == "tea is best"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1.0, None, 3.0]", "[1.0, 3.0]", "line 2: `judge1_scores` holds 2 scores; expected 3"),
        ("[1.0, None, 3.0]", "[1.0, 6, 3.0]", "line 2: '6' is no score; expected a number from -5 to 5"),
        ("[1.0, None, 3.0]", "[1.0, x, 3.0]", "line 2: 'x' is no score"),
        (",2.0,", ",nan,", "line 2: 'nan' is no score"),
        ("Yes.", "", "line 2: `response1` is empty"),
        ("score2\n", "other\n", "no column `score2`"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, old, new, message):
    (tmp_path / "pickside.csv").write_text((HEAD + ROW).replace(old, new))
    with pytest.raises(UserError, match=r"pickside\.csv: ") as caught:
        read_published("pickside", tmp_path)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no mirror\.csv here"):
        read_published("mirror", tmp_path)
    monkeypatch.delenv("BAD_NEURONS_DATA", raising=False)
    with pytest.raises(UserError, match="BAD_NEURONS_DATA"):
        read_published("mirror")
