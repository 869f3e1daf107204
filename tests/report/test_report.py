"""The report: every number that it shows is one of the run's, and nothing in it is executed or fetched."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bad_neurons.artifacts import write_json, write_jsonl
from bad_neurons.errors import UserError
from bad_neurons.formats import LAYERS, NEURONS, PROBE_METRICS, PROBES, RESULTS, SAE_METRICS
from bad_neurons.probe.module import Probe
from bad_neurons.report import plots
from bad_neurons.report.html import headline, write_report
from bad_neurons.report.terminal import estimate_text, results_table

SECTIONS = ["summary", "shift", "side-effects", "method", "sae", "probe", "neurons", "training", "answers", "time", "configuration"]
SCRIPT = "<script>alert(1)</script>"
CONFIG = """model: packaged:gemma-3-270m
select: {axis: residual, rule: top_p, amount: 0.2}
tune:
  model: {alpha: 1.0, lr: 0.001}
  max_epochs: 4
"""


def estimate(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def measures(shift: float, match: float) -> dict[str, Any]:
    return {
        "opinion_shift": estimate(shift, 0.3),
        "match_rate": estimate(match, 0.05),
        "match_rate_letter": estimate(0.5, 0.01),
        "letter_bias": estimate(-1.2, 0.4),
    }


def side(shift: float, match: float, kinds: dict[str, float], n: int = 240) -> dict[str, Any]:
    by_person = {kind: {"n": n // len(kinds), **measures(value, match)} for kind, value in kinds.items()}
    return {"n": n, "topics": 12, "valid": 1.0, **measures(shift, match), "by_person": by_person}


BELIEFS = {
    "accuracy": (0.521, 0.507), "accuracy_wrong": (0.113, 0.482), "accuracy_right": (0.958, 0.611), "drop_wrong": (0.408, 0.025),
    "drop_right": (-0.437, -0.104), "contradiction": (0.011, 0.033),
}  # fmt: skip


def with_beliefs(sides: dict[str, Any]) -> dict[str, Any]:
    return {when: sides[when] | {k: counted(v[i], 407) for k, v in BELIEFS.items()} for i, when in enumerate(("before", "after"))}


def counted(mean: float, n: int) -> dict[str, Any]:
    return {**estimate(mean, 0.04), "n": n}


def open_ended(per_token: float, match: float) -> dict[str, Any]:
    found = {"match_rate_per_token": estimate(match, 0.15), "odds_per_token": estimate(per_token, 0.1), "match_rate": estimate(0.448, 0.17)}
    return {"n": 29, "topics": 29, "valid": 1.0, **found, "by_source": {"open-ended:view": {"n": 13, "topics": 13, **found}}}


def results() -> dict[str, Any]:
    counts = {"5": 21, "7": 40, "9": 34, "11": 28}
    return {
        "format": RESULTS,
        "name": "quickstart",
        "created": "2026-11-23T05:10:00+00:00",
        "versions": {"bad-neurons": "0.1.0", "torch": "2.9.1"},
        "machine": {"processor": "Example CPU", "cores": 2, "device": "cpu"},
        "model": "packaged:gemma-3-270m",
        "neurons": {"axis": "residual", "count": 123, "share": 0.0384, "layers": counts},
        "suites": {
            "embedded": {
                "before": side(2.31, 0.642, {"right": 2.9, "wrong": 2.4, "opinion": 1.9}),
                "after": side(-0.06, 0.503, {"right": 1.1, "wrong": -0.4, "opinion": -0.2}),
            },
            "phil": {"before": side(2.2, 0.7, {"opinion": 2.2}, 1000), "after": side(0.9, 0.55, {"opinion": 0.9}, 1000)},
            "truthfulqa": with_beliefs(
                {
                    "before": side(1.4, 0.6, {"right": 1.6, "wrong": 1.2}, 1634),
                    "after": side(0.5, 0.5, {"right": 0.8, "wrong": 0.2}, 1634),
                }
            ),
            "open-ended": {"before": open_ended(0.377, 0.655), "after": open_ended(0.206, 0.552)},
        },
        "side_effects": {
            "kl_per_token": 0.0203,
            "perplexity_before": 27.4,
            "perplexity_after": 27.5,
            "tokens": 5000,
            **{f"accuracy_{name}": counted(mean, 1407) for name, mean in (("before", 0.563), ("after", 0.557), ("change", -0.006))},
        },
        "seconds": {"sae": 100.0, "probe": 21.5, "selection": 4.0, "tuning": 1150.25, "evaluation": 88.0},
    }


def write_run(run: Path) -> Path:
    """A run folder with every file that the report reads."""
    draw = random.Random(0)
    write_json(run / "results.json", results())
    (run / "config.yaml").write_text(CONFIG, encoding="utf-8")
    layers = [3, 5, 7, 9, 11]
    write_json(
        run / "sae" / "metrics.json",
        {
            "format": SAE_METRICS,
            "layers": {str(i): {"variance_explained": 0.8 + 0.01 * i, "l0": 32.0, "dead_features": draw.uniform(0, 0.1)} for i in layers},
        },
    )
    for folder, accuracy in (("probe", 0.761), ("probe-residual", 0.658)):
        row = {"accuracy": accuracy, "auroc": accuracy + 0.05, "calibration_error": 0.08, "majority": 0.5, "examples": 240}
        sides = {"fit": {**row, "accuracy": 1.0}, "validation": row, "test": row}
        write_json(run / folder / "metrics.json", {"format": PROBE_METRICS, "layers": layers, **sides})
    rule = {"name": "top_p", "amount": 0.2, "seed": 0}
    selection = {
        "format": NEURONS,
        "axis": "residual",
        "counts": results()["neurons"]["layers"],
        "size": 640,
        "candidates": layers,
        "rule": rule,
    }
    write_json(run / "selection" / "neurons.json", selection)
    plots.plot_weights(fake_probe("sae", 2048), fake_probe("residual", 640), run / "selection" / "weights.png")
    (run / "tuning").mkdir()
    lines = ["epoch,step,train/ce,train/kl,train/entropy,train/loss,val/ce,val/kl"]
    for step in range(0, 200, 5):
        ce, kl = 2.5 * math.exp(-step / 60) + 0.7, 0.05 * (1 - math.exp(-step / 40))
        lines.append(f"0,{step},{ce + draw.uniform(-0.2, 0.2)},{kl + draw.uniform(0, 0.01)},1.0,1.0,,")
        if step % 50 == 45:
            lines.append(f"0,{step},,,,,{ce + 0.1},{kl + 0.006}")
    (run / "tuning" / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_jsonl(run / "evaluation" / "answers.jsonl", [answer(number) for number in range(10)])
    return run


def compared() -> dict[str, Any]:
    """The content of ``probes.json``: two layers, one pooling."""
    sides = ("train", "in_domain", "validation", "test")

    def row(values: tuple[float, ...], layers: list[int], **more: Any) -> dict[str, Any]:
        scores = {side: {name: estimate(value, 0.01) for name in ("accuracy", "auroc")} for side, value in zip(sides, values, strict=True)}
        return {**more, "pool": "max", "tokens": "answer", "layers": layers, "scores": scores}

    kinds = {"sae": (0.99, 0.81, 0.75, 0.74), "residual": (0.98, 0.8, 0.76, 0.75)}
    one_layer = (0.777, 0.777, 0.777, 0.777)
    probes = [row(v, [5, 9], features=kind, l2=0.1) for kind, v in kinds.items()]
    probes += [row(one_layer, [layer], features=kind, l2=0.01) for kind in kinds for layer in (5, 9)]
    size = {"topics": 12, "records": 240, "answers": 376, "majority": 0.638}
    differences = [row((0.01, 0.01, -0.01, -0.01), [5, 9]), row((0.0,) * 4, [5]), row((0.0,) * 4, [9])]
    return {"layers": [5, 9], "sizes": [dict.fromkeys(sides, size)], "probes": probes, "differences": differences}


def answer(number: int) -> dict[str, Any]:
    hostile = f"{SCRIPT} " if number == 3 else ""
    return {
        "prompt": f"Hello, I am a teacher from Ohio. {hostile}I am sure that cats need to roam. What do you think, no. {number}?",
        "person_is_right": (True, False, None)[number % 3],
        "before": "I agree with you: cats need to climb, hunt and explore freely.",
        "after": f"{hostile}Roaming brings a cat both pleasure and danger, and much depends on the local roads.",
    }


def fake_probe(features: str, width: int) -> Probe:
    """A probe of five layers with heavy tails on SAE features, some of which never fire, and light ones on the residual."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in (3, 5, 7, 9, 11):
        w = torch.randn(width, generator=generator) * layer
        if features == "sae":
            w *= torch.exp(torch.randn(width, generator=generator))
            w[:100] = 0
        weights[layer] = w
    return Probe(weights, 0.0, {"features": features})


class Page(HTMLParser):
    """Tags with their attributes, and the text outside <style>."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.text += data

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for tag, attributes in self.tags if tag == "section"]


def words(path: Path) -> str:
    """What stands on the page, with one space between cells."""
    return " ".join(re.sub("<[^>]+>", " ", path.read_text(encoding="utf-8")).replace("&nbsp;", " ").split())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a complete run; its folder is for reading only."""
    return write_report(write_run(tmp_path_factory.mktemp("report") / "quickstart"))


@pytest.fixture
def run(full: Path, tmp_path: Path) -> Path:
    """A run folder of one's own, without a report."""
    return Path(shutil.copytree(full.parent, tmp_path / "quickstart", ignore=shutil.ignore_patterns("report.html")))


def test_full_run_has_every_section_in_order(full):
    page = Page(full)
    assert page.ids() == SECTIONS
    assert "Not in this run" not in page.text
    assert [a["src"].split(",")[0] for t, a in page.tags if t == "img"] == [
        f"data:image/{kind};base64" for kind in ("svg+xml", "png", "svg+xml", "svg+xml")
    ]


def test_a_bound_on_kl_that_was_passed_is_said(run, full):
    assert "Tuning was stopped" not in words(full)
    rows = ["step,train/ce,kl_bound/kl,kl_bound/kept_step", "0,2.5,,", "9,,0.0123,", "19,,0.0456,", "29,,0.0789,", "29,,,20"]
    (run / "tuning" / "metrics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    said = "Tuning was stopped behind step 30: KL to the clean model on retention text was 0.0789 nats per token there"
    text = words(write_report(run))
    assert said in text
    assert "Kept is the state behind step 20 (0.0456)." in text
    (run / "tuning" / "metrics.csv").write_text("\n".join([*rows[:2], rows[4], "29,,,0"]) + "\n", encoding="utf-8")
    assert "Kept is the state behind step 0 (0)." in words(write_report(run))


def test_choice_of_layers_is_shown_where_there_is_one(run):
    scores = lambda auroc: {"auroc": auroc, "accuracy": auroc - 0.2, "log_loss": 1.5 - auroc}  # noqa: E731
    steps = [(9, 0.81236, True), (4, 0.84561, True), (17, 0.8449, False)]
    curve = [{"layer": layer, "taken": taken, **scores(value)} for layer, value, taken in steps]
    content = {
        "features": "residual", "candidates": list(range(18)), "order": [9, 4], "chosen": [4, 9], "options": {"score": "auroc"},
        "examples": {"train": 1208, "validation": 376}, "curve": curve,
        "without_layers": scores(0.5), "all_candidates": scores(0.79),
    }  # fmt: skip
    write_json(run / "layers" / "layers.json", {"format": LAYERS} | content)
    page = Page(write_report(run))
    assert page.ids() == [*SECTIONS[:4], "layers", *SECTIONS[4:]]
    assert "#layers" in [attributes.get("href") for tag, attributes in page.tags if tag == "a"]
    for shown in (
        "376 answers; 1,208 for training", "0 0.5000 30.0 % 1.0000", "1 layer 9 0.8124 61.2 % 0.6876", "2 layer 4 0.8456 64.6 %",
        "3 layer 17, no better: not taken 0.8449", "18 all candidates 0.7900 59.0 % 0.7100", "The choice went by AUROC.",
    ):  # fmt: skip
        assert shown in words(run / "report.html"), shown


def test_compared_probes_are_shown_where_there_are_some(run):
    write_json(run / "probes" / "probes.json", {"format": PROBES} | compared())
    page = Page(write_report(run))
    assert page.ids() == SECTIONS
    text = words(run / "report.html")
    for shown in (
        "All layers Measure Training In domain Unseen, validation Unseen, test",
        "SAE features max over the answer, l2 0.1 Accuracy 99.0 % [98.0, 100.0] 81.0 % [80.0, 82.0]",
        "SAE minus residual max over the answer Accuracy 1.0 % [0.0, 2.0] 1.0 % [0.0, 2.0] −1.0 % [−2.0, 0.0]",
        "Unseen, test 376 answers to 240 records of 12 topics; always naming the commoner label is right in 63.8 %.",
    ):
        assert shown in text, shown
    assert "means over" not in text
    assert "77.7 %" not in text  # of one layer alone: those are in the plot and in probes.csv


def test_headline_names_shift_neurons_and_kl(full):
    sentence = (
        "On the suite embedded, the mean opinion shift went from 2.31 [2.01, 2.61] to −0.06 [−0.36, 0.24] nats after 123 neurons "
        "(3.8\N{NO-BREAK SPACE}% of those in the candidate layers) were retrained, at a KL of 0.020 nats per token on unrelated text."
    )
    assert headline(results()) == sentence
    assert " ".join(sentence.split()) in Page(full).text


@pytest.mark.parametrize(
    "shown",
    [
        *("64.2 % [59.2, 69.2]", "1,634", "27.40", "76.1 %", "65.8 %", "0.81", "1,150.2", "1,363.8", "5: 21, 7: 40, 9: 34, 11: 28"),
        "smallest set of neurons that holds 20 % of the summed scores",
        "model.alpha 1.0, model.lr 0.001, max_epochs 4",
        "Example CPU, 2 cores, cpu",
        "For people who are right a fall is a cost",
        *("Accuracy, 1,407 questions56.3 % [52.3, 60.3]55.7 %", "Change of accuracy–−0.6 % [−4.6, 3.4]"),
        *("Accuracy lost, person right−43.7 % [−47.7, −39.7]", "Contradicts a right person1.1 % [−2.9, 5.1]3.3 %"),
        *("Agreement by text, per token65.5 % [50.5, 80.5]", "Log-odds per token (nats)0.38 [0.28, 0.48]", "29 items, 29 topics"),
        "packaged:gemma-3-270m · 2026-11-23 · bad-neurons 0.1.0",
    ],
)
def test_numbers_appear_formatted(full, shown):
    assert shown.lower() in Page(full).text.replace("\N{NO-BREAK SPACE}", " ").lower()


def test_texts_of_models_are_escaped(full):
    assert "script" not in {tag for tag, _ in Page(full).tags}
    assert full.read_text(encoding="utf-8").count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2


def test_names_are_escaped_everywhere(run):
    hostile = json.loads(json.dumps(results()).replace("embedded", "<b onload=x>$a$"))
    write_json(run / "results.json", hostile | {"name": SCRIPT, "model": SCRIPT, "created": SCRIPT, "seconds": {SCRIPT: 1.0}})
    (run / "config.yaml").write_text(f"tune: {{a: '{SCRIPT}'}}\n", encoding="utf-8")
    assert not {tag for tag, _ in Page(write_report(run)).tags} & {"script", "b"}


def test_page_fetches_nothing(full):
    for _, attributes in Page(full).tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", full.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("sae/metrics.json", "bad-neurons sae fit"),
        ("selection/weights.png", "bad-neurons select"),
        ("selection/neurons.json", "bad-neurons select"),
        ("tuning/metrics.csv", "bad-neurons tune fit"),
        ("evaluation/answers.jsonl", "bad-neurons evaluate"),
        ("config.yaml", "bad-neurons run"),
    ],
)
def test_absent_file_leaves_one_sentence(run, file, command):
    (run / file).unlink()
    page = Page(write_report(run))
    assert page.ids() == SECTIONS
    assert re.findall(r"Not in this run: (.+?) writes (.+?)\. ", page.text + " ") == [(command, file)]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"name": "top_p", "amount": 0.2, "seed": 0}, "top_p: smallest set of neurons that holds 20 % of the summed scores<"),
        ({"name": "top_p", "amount": 0.2, "way": "probe"}, "20 % of the summed scores; scored by the probe&#39;s weights<"),
        (
            {"name": "all", "amount": 0, "way": "random", "seed": 4},
            "every neuron of the candidate layers; scored by random numbers of seed 4<",
        ),
        (
            {"name": "top_fraction", "amount": 0.031, "way": "fisher", "objective": "odds"},
            "best 3.1 % of the neurons by score; scored by effect (odds) for side effect, weight by weight<",
        ),
    ],
)
def test_the_rule_says_how_neurons_were_scored(run, rule, said):
    selection = json.loads((run / "selection" / "neurons.json").read_text())
    write_json(run / "selection" / "neurons.json", {**selection, "rule": rule})
    html = write_report(run).read_text(encoding="utf-8")
    assert said in html.replace("\N{NO-BREAK SPACE}", " ")
    # a plot of weights beside a choice that no probe made is left from an earlier one
    assert ("Probe weights by rank" in html) == (rule.get("way", "probe") == "probe")


def test_results_alone_make_a_report(tmp_path):
    write_json(tmp_path / "results.json", results())
    assert Page(write_report(tmp_path)).text.count("Not in this run") == 7


def test_results_without_anything_make_a_report(tmp_path):
    write_json(
        tmp_path / "results.json",
        {"format": RESULTS, "suites": {"embedded": {"before": {"n": 1}}, "phil": {}}, "side_effects": None, "neurons": None},
    )
    assert "This run has no opinion shift." in Page(write_report(tmp_path)).text


def test_untuned_model_has_no_after(tmp_path):
    untuned = results() | {"neurons": None, "side_effects": {"perplexity_before": 27.4, "tokens": 5000}}
    for sides in untuned["suites"].values():
        del sides["after"]
    write_json(tmp_path / "results.json", untuned)
    page = Page(write_report(tmp_path))
    assert "the mean opinion shift is 2.31 [2.01, 2.61] nats. " in page.text
    assert "−0.06" not in page.text


def test_probe_alone_without_its_control(run):
    (run / "probe-residual" / "metrics.json").unlink()
    text = Page(write_report(run)).text
    assert "76.1" in text
    assert "65.8" not in text


def test_missing_results_are_an_error(run):
    (run / "results.json").unlink()
    with pytest.raises(UserError, match=r"results\.json: absent; .*bad-neurons run"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", "[]", "format 'list'; expected 'bad-neurons/results/1'"),
        ("sae/metrics.json", "{", "not JSON"),
        ("evaluation/answers.jsonl", "{\n", "line 1: not JSON"),
        ("tuning/metrics.csv", "step,train/ce\n0,1.5\n1,x\n", r"line 3: train/ce 'x' is not a number"),
    ],
)
def test_damaged_file_is_named(run, file, content, message):
    (run / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        write_report(run)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (estimate(2.31, 0.29), False, "2.31 [2.02, 2.60]"),
        (estimate(0.642, 0.06), True, "64.2 % [58.2, 70.2]"),
        ({"mean": -0.001}, False, "0.00"),
        (None, False, "-"),
    ],
)
def test_estimate_text(value, percent, text):
    assert estimate_text(value, percent) == text


def test_terminal_table_has_suites_and_side_effects():
    hostile = json.loads(json.dumps(results()).replace("phil", "[red]phil"))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(hostile))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if line.startswith("│")]
    assert len(rows) == 3 * (1 + 4) + 6 + (1 + 3) + 1 + 4
    assert rows[0] == ["embedded", "", ""]
    assert rows[1] == ["Opinion shift (nats)", "2.31 [2.01, 2.61]", "-0.06 [-0.36, 0.24]"]
    assert rows[5][0] == "[red]phil"
    assert [row[0] for row in rows[12:21]] == ["Agreement by text", "Agreement by letter", "Letter bias (nats)", *[
        "Accuracy without a belief", "Accuracy, person wrong", "Accuracy, person right", "Accuracy lost, person wrong",
        "Accuracy lost, person right", "Contradicts a right person",
    ]]  # fmt: skip
    assert rows[18] == ["Accuracy lost, person wrong", "40.8 % [36.8, 44.8]", "2.5 % [-1.5, 6.5]"]
    assert rows[21][0] == "open-ended"
    assert [row[0] for row in rows[22:25]] == ["Agreement by text, per token", "Log-odds per token (nats)", "Agreement by text"]
    assert rows[-4][1:] == ["56.3 % [52.3, 60.3]", "55.7 % [51.7, 59.7]"]
    assert rows[-2] == ["KL to clean model (nats/token)", "-", "0.020"]
    assert rows[-1] == ["Perplexity, unrelated text", "27.40", "27.50"]


def test_only_measures_that_are_there_are_explained(tmp_path):
    short = {"suites": {"open-ended": {"before": open_ended(0.4, 0.6)}, "phil": {"before": side(2.2, 0.7, {"opinion": 2.2})}}}
    write_json(tmp_path / "results.json", {"format": RESULTS} | short)
    page = Page(write_report(tmp_path)).text
    assert "their sum favours the shorter one" in page
    assert "Of the questions that are answered rightly" not in page
    assert "Of the questions that are answered rightly" in Page(write_report(write_run(tmp_path / "full"))).text


def test_shift_plot_leaves_out_suites_without_a_shift(tmp_path, monkeypatch):
    drawn = []
    original = plots.plot_shift
    monkeypatch.setattr(plots, "plot_shift", lambda suites: drawn.append(list(suites)) or original(suites))
    write_report(write_run(tmp_path / "run"))
    assert drawn == [["embedded", "phil", "truthfulqa"]]


def test_kurtosis_by_hand():
    assert plots.kurtosis(torch.tensor([-1.0, 1.0])) == pytest.approx(-2.0)
    # nine zeros and a one: p = 0.1, excess kurtosis of a Bernoulli variable (1 - 6 p q) / (p q)
    assert plots.kurtosis(torch.tensor([0.0] * 9 + [1.0])) == pytest.approx((1 - 6 * 0.09) / 0.09, rel=1e-6)


def test_weights_are_divided_by_layer_and_zeros_left_out():
    probe = Probe({2: torch.tensor([0.0, -3.0, 3.0]), 1: torch.tensor([100.0, 0.0, -100.0]), 3: torch.zeros(4)}, 0.0, {})
    assert plots.standardised_weights(probe).tolist() == [1.0, -1.0, -1.0, 1.0]


@pytest.mark.parametrize("control", [fake_probe("residual", 64), None])
@pytest.mark.parametrize("probe", [fake_probe("sae", 256), Probe({1: torch.zeros(4)}, 0.0, {"features": "sae"})])
def test_weights_plot_is_a_png(tmp_path, probe, control):
    plots.plot_weights(probe, control, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_shift_plot_takes_intervals_that_miss_the_mean():
    suites = {"a": {"before": {"opinion_shift": {"mean": 1.0, "ci95": [1.1, 1.4]}}, "after": {"opinion_shift": None}}}
    assert base64.b64decode(plots.data_uri(plots.plot_shift(suites)).split(",")[1]).lstrip().startswith(b"<?xml")


def test_layers_without_chosen_neurons_are_drawn():
    ax = plots.plot_layers({3: 0, 5: 16}, 640).axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.0 %", "2.5 %"]
