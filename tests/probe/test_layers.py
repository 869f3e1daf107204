"""Greedy selection against refits to the features, its rules by hand, and the command from records to its files."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from torchmetrics.functional.classification import binary_auroc

from bad_neurons.cli import main
from bad_neurons.errors import UserError
from bad_neurons.probe import layers as layers_module
from bad_neurons.probe.layers import Scores, select_layers, validation_scores
from bad_neurons.report.plots import plot_layer_curve
from bad_neurons.testing import save_tiny_saes
from helpers import write_records
from logistic import reference, sparse

N, M = 120, 80


def side(features, rows):
    return {layer: x[rows] for layer, x in features.items()}


@pytest.fixture(scope="module")
def problem():
    """Five layers, of which 3 and 7 carry the label, each a different part of it; arguments of ``select_layers`` but l2."""
    generator = torch.Generator().manual_seed(3)
    y = (torch.arange(N + M) % 2).double()
    features = {layer: sparse(N + M, 10 + layer, layer, 1 + layer).double() for layer in (1, 3, 4, 7, 8)}
    half = torch.rand(N + M, generator=generator) < 0.6
    for layer, seen in ((3, half), (7, ~half)):
        carried = 1.5 * (2 * y - 1) * seen + 0.5 * torch.randn(N + M, generator=generator)
        features[layer][:, :3] += (1 + layer) * 4 * carried[:, None].relu()
    train, held_out = slice(0, N), slice(N, N + M)
    return side(features, train), side(features, held_out), y[train], y[held_out]


def refitted(train, held_out, y, y_held_out, layers, l2):
    """AUROC and log-odds of the held-out side by a fit to the features of the layers themselves."""
    x, z = (torch.cat([features[layer] for layer in sorted(layers)], 1) for features in (train, held_out))
    w, bias = reference(x, y, l2)
    logits = z / x.square().mean().sqrt() @ w + bias
    return float(binary_auroc(logits, y_held_out.int())), logits


def test_greedy_is_greedy_by_refitting(problem):
    train, _, _, y_held_out = problem
    found = select_layers(*problem, l2=0.03, budget=4)
    chosen, best = [], 0.5
    for step in found.steps:
        rest = [layer for layer in train if layer not in chosen]
        refits = {layer: refitted(*problem, [*chosen, layer], 0.03) for layer in rest}
        assert list(step.candidates) == rest
        for layer, (auroc, logits) in refits.items():
            scores = step.candidates[layer]
            assert scores.auroc == pytest.approx(auroc, abs=1e-6)
            assert scores.log_loss == pytest.approx(
                float(torch.nn.functional.binary_cross_entropy_with_logits(logits, y_held_out)), abs=1e-5
            )
            assert scores.accuracy == pytest.approx(float(((logits > 0) == (y_held_out > 0)).double().mean()))
        first = max(refits, key=lambda layer: refits[layer][0])
        assert (step.layer, step.scores) == (first, step.candidates[first])
        assert step.taken == (refits[first][0] > best)
        if step.taken:
            chosen.append(first)
            best = refits[first][0]
    assert found.order == chosen
    assert found.chosen == sorted(chosen)
    assert found.everything.auroc == pytest.approx(refitted(*problem, list(train), 0.03)[0], abs=1e-6)


def test_layers_that_carry_the_label_come_before_noise(problem):
    found = select_layers(*problem, l2=0.1)
    assert set(found.order) == {3, 7}  # the budget of a third of five layers is two
    assert found.steps[1].scores.auroc > found.steps[0].scores.auroc + 0.05
    noise = [found.steps[0].candidates[layer].auroc for layer in (1, 4, 8)]
    assert max(noise) < found.steps[0].scores.auroc - 0.1


def test_what_cannot_be_improved_ends_the_selection(problem):
    """Layer 5 puts every pair in order; the round that finds no better one is kept, its layer is not."""
    train, held_out, y, y_held_out = problem
    train, held_out = ({**x, 5: labels[:, None] * torch.ones(3)} for x, labels in ((train, y), (held_out, y_held_out)))
    found = select_layers(train, held_out, y, y_held_out, l2=0.1, budget=6)
    assert [step.taken for step in found.steps] == [True, False]
    assert (found.order, found.chosen) == ([5], [5])
    assert found.steps[0].scores.auroc == 1.0
    assert set(found.steps[1].candidates) == {1, 3, 4, 7, 8}


def test_no_layer_better_than_none(problem):
    _, _, y, y_held_out = problem
    nothing = {0: torch.zeros(N, 2), 1: torch.zeros(N, 2)}, {0: torch.zeros(M, 2), 1: torch.zeros(M, 2)}
    found = select_layers(*nothing, y, y_held_out, l2=0.1)
    assert found.chosen == []
    assert [(step.layer, step.taken) for step in found.steps] == [(0, False)]
    assert found.without == Scores(0.5, 0.5, pytest.approx(math.log(2)))


@pytest.mark.parametrize(("count", "budget", "steps"), [(5, 1, 1), (5, 3, 3), (5, None, 2), (4, None, 1), (1, None, 1)])
def test_budget(problem, monkeypatch, count, budget, steps):
    """With a score that always improves, the selection takes as many layers as it may."""
    calls = iter(range(10_000))
    monkeypatch.setattr(layers_module, "scores_of_each", lambda logits, y: [Scores(float(next(calls)), 0.5, 1.0) for _ in logits])
    train, held_out, y, y_held_out = problem
    some = [{layer: x[layer] for layer in list(x)[:count]} for x in (train, held_out)]
    assert len(select_layers(*some, y, y_held_out, l2=0.1, budget=budget).chosen) == steps


@pytest.mark.parametrize(
    ("score", "first"),
    [("auroc", 0), ("accuracy", 2), ("log_loss", 3)],  # accuracy: 1 and 2 tie, and 2 has the lower log loss; log loss: 3 and 4 tie
)
def test_score_that_decides_and_ties(problem, monkeypatch, score, first):
    _, _, y, y_held_out = problem
    rows = [(0.9, 0.5, 0.6), (0.8, 0.7, 0.5), (0.8, 0.7, 0.4), (0.6, 0.6, 0.3), (0.6, 0.6, 0.3)]
    scores = iter([Scores(0.5, 0.5, 0.7), *(Scores(*row) for row in rows), Scores(0.5, 0.5, 0.7)])
    monkeypatch.setattr(layers_module, "scores_of_each", lambda logits, y: [next(scores) for _ in logits])
    features = {layer: torch.rand(N, 2) for layer in range(5)}, {layer: torch.rand(M, 2) for layer in range(5)}
    assert select_layers(*features, y, y_held_out, l2=0.1, budget=1, score=score).order == [first]


def test_scores_by_hand():
    """Log-odds -2 -1 1 1 3 with labels 0 1 0 1 1: of six pairs four are in order and one ties."""
    logits, y = torch.tensor([-2.0, -1.0, 1.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    found = validation_scores(logits, y)
    softplus = [math.log1p(math.exp(z)) for z in (-2, 1, 1, -1, -3)]
    assert found == pytest.approx(Scores(4.5 / 6, 3 / 5, sum(softplus) / 5))


def test_same_result_for_any_number_of_threads(problem):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(select_layers(*problem, l2=0.1, budget=3))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"l2": 0.0}, r"--l2 0.0: above 0"),
        ({"l2": -1.0}, r"--l2 -1.0: above 0"),
        ({"budget": 0}, r"--budget 0: 1 to 5 \(the candidate layers\), or null"),
        ({"budget": 6}, r"--budget 6: 1 to 5"),
        ({"y_train": torch.ones(N)}, r"training labels: 120 of 120 are 1"),
        ({"y_validation": torch.zeros(M)}, r"validation labels: 0 of 80 are 1"),
        ({"train": {}}, r"--candidates \[\]: one layer or more"),
    ],
)
def test_options_that_make_no_sense(problem, changes, said):
    names = ("train", "validation", "y_train", "y_validation")
    with pytest.raises(UserError, match=said):
        select_layers(**{**dict(zip(names, problem, strict=True)), "l2": 0.1, **changes})


def test_features_that_are_not_finite(problem):
    train, *others = problem
    spoilt = {layer: x.clone() for layer, x in train.items()}
    spoilt[4][2, 1] = math.inf
    with pytest.raises(UserError, match=r"features of layer 4: not all of them are finite"):
        select_layers(spoilt, *others, l2=0.1)


def test_too_many_examples_for_the_memory(problem, monkeypatch):
    """120 and 80 answers at 5 layers: 4 * 5 * 120 * 200 bytes of products, and 16 * 120^2 for a fit; the page is made small."""
    monkeypatch.setattr(layers_module.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 710_399}.__getitem__)
    monkeypatch.setattr(layers_module, "_MAX_WORKERS", 1)
    with pytest.raises(UserError, match=r"--max_records: the inner products of 120 training answers at 5 layers take .* 29 records fit"):
        select_layers(*problem, l2=0.1)
    monkeypatch.setattr(layers_module.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 710_400}.__getitem__)
    assert select_layers(*problem, l2=0.1).chosen


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    """``bad-neurons layers`` on residual features of a tiny model, into ``tmp_path``."""
    records = write_records(tmp_path / "records.jsonl")
    return [
        "layers", "--model", tiny_folder(), "--features", "residual", "--records", records, "--dtype", "float32", "--l2", "0.1",
        "--folder", str(tmp_path / "features"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip


def test_command_writes_what_it_found(arguments, tmp_path, tiny, capsys):
    assert main([*arguments, "--budget", "2"]) == 0
    written = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert written["candidates"] == [0, 1, 2, 3]  # all of the model
    assert written["model"] == {"id": arguments[2], "digest": tiny().digest}
    assert (written["format"], written["features"], written["sae"]) == ("bad-neurons/layers/2", "residual", None)
    assert written["options"] == {
        "score": "auroc", "l2": 0.1, "budget": 2, "records": arguments[6], "validation": 0.2, "test": 0.2, "split_seed": 0,
        "max_records": 0,
    }  # fmt: skip
    # Six topics of four records: two for training less, one each for validation and test; two answers of each person who is
    # wrong and one honest answer of each who is right.
    assert written["examples"] == {"train": 4 * 6, "validation": 6}
    assert written["chosen"] == sorted(written["order"])
    assert written["order"] == [point["layer"] for point in written["curve"] if point["taken"]]
    assert [len(scores) for scores in written["scores"]] == [4, 3][: len(written["curve"])]
    for point, scores in zip(written["curve"], written["scores"], strict=True):
        assert scores[str(point["layer"])].items() <= point.items()
        assert point["auroc"] == max(candidate["auroc"] for candidate in scores.values())
    assert (tmp_path / "out" / "layers.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    captured = capsys.readouterr()
    assert "Chosen:" in captured.out
    assert "probes of candidate layers" in captured.err


def test_candidates_are_the_layers_that_have_an_sae(arguments, tmp_path):
    saes = save_tiny_saes(tmp_path / "saes", [0, 3])
    assert main([*arguments, "--features", "sae", "--sae", saes]) == 0
    written = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert (written["candidates"], written["widths"], written["sae"]) == ([0, 3], [32, 32], saes)
    assert len(written["curve"]) == 1  # a third of two layers, rounded


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--candidates", "[1,9]"], "--candidates: [9]: this model has layers 0 to 3"),
        (["--candidates", "[1,1]"], "--candidates [1, 1]: one layer or more, each of them once"),
        (["--budget", "5"], "--budget 5: 1 to 4"),
        (["--l2", "0"], "--l2 0.0: above 0"),
        (["--score", "f1"], "score"),
        (["--features", "sae", "--sae", "null"], "--sae: needed for --features sae"),
        (["--features", "sae", "--sae", "tests"], "--sae tests: no layer-<number> in this folder"),
        (["--model", "nobody/nothing"], "nobody/nothing: not a folder here"),
    ],
)
def test_bad_options_end_with_one_line(arguments, tmp_path, capsys, wrong, said):
    capsys.readouterr()
    assert main([*arguments, *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1]
    assert [line for line in lines if line.startswith("bad-neurons: ")] == lines[-1:]
    assert not (tmp_path / "out").exists()


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["layers", "--print_config", "--model", "m"])
    options = yaml.safe_load(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["layers", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in options:
        explained = text.split(f" --{option} ")[-1].split("(", 1)[0].split()
        assert len(explained) > 4, option
    assert "Args:" not in text


@pytest.mark.parametrize(("taken", "lines"), [(2, 2), (1, 4), (0, 4)])
def test_plot_marks_what_was_taken(taken, lines):
    axes = plot_layer_curve([3, 7], [0.8, 0.7], taken, 0.75, "AUROC").axes[0]
    assert [text.get_text() for text in axes.texts] == ["layer 3", "layer 7"]
    assert list(axes.lines[0].get_ydata()) == [0.8, 0.7][:taken]
    assert axes.get_ylabel() == "validation AUROC"
    assert len(axes.lines) == lines
