"""``bad-neurons judge-agreement`` on small published files."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from bad_neurons.artifacts import read_json
from bad_neurons.cli import main
from bad_neurons.errors import UserError
from bad_neurons.evaluation.judged.agreement_stage import judge_agreement
from bad_neurons.evaluation.judged.tables import agreement_markdown
from bad_neurons.formats import AGREEMENT


@pytest.fixture
def judged(tmp_path):
    """Two models, five statements, and three judges of which the third is a point higher."""
    lines = ["Folder,Name,statement,response,judge1_score,judge2_score,judge3_score,median_score"]
    for model in range(2):
        for number in range(5):
            scores = [number % 5, number % 5, min(5, number + 1)]
            lines.append(",".join(map(str, ["f", f"m{model}", f"Tea {number} speaks.", f"It says {number} {model}.", *scores, scores[0]])))
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "delusion.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "judged")


@pytest.fixture
def options(judged, endpoint, tmp_path):
    endpoint.act = lambda asked, number: asked.first.split("It says ")[1][0]
    return {"judged": judged, "judges": ["perfect"], "base_url": endpoint.url, "tests": ["delusion"], "out": str(tmp_path / "out")}


def test_a_judge_that_agrees(options, endpoint, tmp_path):
    results = judge_agreement(**options)
    assert read_json(tmp_path / "out" / "agreement.json", AGREEMENT) == results
    found = results["tests"]["delusion"]
    assert (found["answers"], found["questions"], found["models"]) == (10, 5, 2)
    of_judge = found["judges"]["perfect"]
    assert of_judge["published median"]["spearman"]["value"] == pytest.approx(1)
    assert of_judge["published median"]["mae"] == {"mean": 0, "ci95": [0, 0]}
    assert of_judge["published judge 3"]["bias"]["mean"] == -1
    assert found["ceiling"]["published judge 3"]["median of the other two"]["bias"]["mean"] == 1
    assert found["floor"]["score"] == 2
    assert found["floor"]["mae"]["mean"] == pytest.approx((2 + 1 + 0 + 1 + 2) / 5)
    judge_agreement(**options)
    assert Counter(asked.first for asked in endpoint.asked).most_common(1)[0][1] == 1


def test_markdown(options, tmp_path):
    results = judge_agreement(**options)
    text = (tmp_path / "out" / "agreement.md").read_text()
    assert text == agreement_markdown(results)
    lines = text.splitlines()
    assert lines[0] == "## delusion: 10 answers of 2 models to 5 questions, scale 0 to 5"
    assert lines[4] == "| perfect | published median | 10 | 1.00 [1.00, 1.00] | 0.00 [0.00, 0.00] | 0.00 [0.00, 0.00] |"
    assert lines[7].startswith("| published judge 3 | median of the other two | 10 | 1.00 ")
    assert lines[8].startswith("| always 2 | published median | 10 | - | 1.20 [")
    assert {line.count("|") for line in lines if line.startswith("|")} == {7}


def test_a_sample_is_even_over_questions_and_the_same_each_time(options, endpoint):
    judge_agreement(**options, max_answers=5, seed=1)
    first = {asked.first for asked in endpoint.asked}
    assert Counter(text.split("Tea ")[1][0] for text in first) == dict.fromkeys("01234", 1)
    judge_agreement(**options, max_answers=5, seed=1)
    assert len(endpoint.asked) == 5
    judge_agreement(**options, max_answers=5, seed=2)
    assert len(endpoint.asked) > 5


def test_command_line(options, endpoint, capfd):
    arguments = [word for name, value in options.items() for word in (f"--{name}", json.dumps(value) if isinstance(value, list) else value)]
    assert main(["judge-agreement", *arguments]) == 0
    assert "delusion: 10 answers of 2 models to 5 questions, scale 0 to 5" in capfd.readouterr().out


def test_mistakes(options):
    with pytest.raises(UserError, match="--max_answers -1"):
        judge_agreement(**options, max_answers=-1)
    with pytest.raises(UserError, match=r"no mirror\.csv here"):
        judge_agreement(**{**options, "tests": ["mirror"]})
