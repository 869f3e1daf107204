"""The sweep: what is found, exactly as many trials, the same ones whoever stopped it and how, and what is written."""

from __future__ import annotations

import csv
import math
import multiprocessing
from functools import partial

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from bad_neurons.compare.sweep import nested, read_space, write_results
from bad_neurons.compare.sweep_plots import plot_sweep
from bad_neurons.compare.sweep_workers import run_sweep
from bad_neurons.errors import UserError
from sweep_toys import SPACE, exploding, meeting, run_until_killed, shift_and_kl, toy, toy_sweep


def measured(sweep):
    """What was tried and measured, in order: options and value."""
    return [(t.params, t.value) for t in sweep.study.trials if t.state is TrialState.COMPLETE]


def rows(folder):
    with open(folder / "sweep.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_best_within_the_bound(tmp_path):
    sweep = toy_sweep(tmp_path)
    run_sweep(sweep, toy, 60)
    write_results(sweep)
    table = rows(tmp_path)
    assert len(table) == 60
    inside = [row for row in table if row["within_bounds"] == "True"]
    assert all((float(row["kl"]) <= 0.01) == (row in inside) for row in table)
    best = min(inside, key=lambda row: abs(float(row["shift"])))
    assert sweep.best().number == int(best["trial"])
    assert min(abs(float(row["shift"])) for row in table) < abs(float(best["shift"]))  # outside there is less shift
    assert 0.75 <= abs(float(best["shift"])) < 0.85  # 0.75 is the least that there is within it
    assert best["kind"] == "b"
    written = (tmp_path / "best.yaml").read_text()
    assert written.startswith(f"# Trial {best['trial']}, the best of 60 with kl at most 0.01: shift ")
    options = {"tune": {"model": {"lr": float(best["tune.model.lr"])}}, "select": {"amount": float(best["select.amount"])}, "kind": "b"}
    assert yaml.safe_load(written) == options
    assert shift_and_kl(options) == pytest.approx({name: float(best[name]) for name in ("shift", "kl", "away")})


def test_it_learns(tmp_path):
    sweep = toy_sweep(tmp_path)
    run_sweep(sweep, toy, 60)
    shifts = [value + 9 * (params["select.amount"] > 0.25) for params, value in measured(sweep)]
    assert sum(shifts[40:]) < 0.7 * sum(shifts[:20])


def test_stopped_and_gone_on_is_uninterrupted(tmp_path):
    whole, parts = toy_sweep(tmp_path / "whole"), tmp_path / "parts"
    run_sweep(whole, toy, 25)
    for trials in (4, 13, 13, 25):  # another process each time
        run_sweep(toy_sweep(parts), toy, trials)
        assert len(measured(toy_sweep(parts))) == trials
    assert measured(toy_sweep(parts)) == measured(whole)
    other = toy_sweep(tmp_path / "other", seed=1)
    run_sweep(other, toy, 3)
    assert measured(other)[0] != measured(whole)[0]


def test_a_killed_process_loses_nothing(tmp_path):
    whole, killed = toy_sweep(tmp_path / "whole"), toy_sweep(tmp_path / "killed")
    run_sweep(whole, toy, 15)
    process = multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(tmp_path / "killed", 12, 15))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert [t.state for t in killed.study.trials] == [TrialState.COMPLETE] * 12 + [TrialState.RUNNING]
    run_sweep(killed, toy, 15)
    assert measured(killed) == measured(whole)
    write_results(killed)
    assert len(rows(tmp_path / "killed")) == 15


def test_what_runs_elsewhere_is_left_alone(tmp_path):
    sweep = toy_sweep(tmp_path)
    sweep.claim(9).set_user_attr("process", "another-machine:1")
    run_sweep(sweep, toy, 4)
    assert [t.state for t in sweep.study.trials] == [TrialState.RUNNING] + [TrialState.COMPLETE] * 3


def test_two_processes_on_one_study(tmp_path):
    (tmp_path / "there").mkdir()
    sweep = toy_sweep(tmp_path / "study")
    run_sweep(sweep, partial(meeting, tmp_path / "there", 2), 11, processes=2)
    trials = sweep.study.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 11
    assert len({t.user_attrs["process"] for t in trials}) == 2
    assert len({t.params["tune.model.lr"] for t in trials}) == 11
    for trial in trials:
        assert trial.value == -shift_and_kl(nested(trial.params))["shift"]


def test_nothing_is_made_where_nothing_is_left(tmp_path):
    run_sweep(toy_sweep(tmp_path), toy, 3)
    run_sweep(toy_sweep(tmp_path), lambda: pytest.fail("made"), 3)


def test_what_cannot_be_measured(tmp_path):
    sweep = toy_sweep(tmp_path, bound=0.03)
    run_sweep(sweep, lambda: exploding, 40)
    write_results(sweep)
    table = rows(tmp_path)
    refused, broken = [r for r in table if r["error"]], [r for r in table if r["shift"] == "nan"]
    assert len(table) == 40
    assert refused and broken  # noqa: PT018 (that there are such, before what is true of them)
    assert {r["error"][-17:] for r in refused} == {"no neuron is left"}
    assert all(float(r["select.amount"]) < 0.1 for r in refused)
    assert {r["within_bounds"] for r in (*refused, *broken)} == {"False"}
    assert math.isfinite(sweep.best().value)


def test_no_trial_within_the_bound(tmp_path):
    sweep = toy_sweep(tmp_path, bound=-1.0)
    run_sweep(sweep, toy, 3)
    write_results(sweep)
    assert sweep.best() is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.log", "sweep.csv", "sweep.png"]


def test_every_trial_fails(tmp_path):
    def refuse(options):
        raise UserError(f"amount {options['select']['amount']:.1f}: too much")

    sweep = toy_sweep(tmp_path)
    run_sweep(sweep, lambda: refuse, 3)
    with pytest.raises(UserError, match=r"no trial was measured; the first failed: amount 0\.\d: too much"):
        write_results(sweep)
    with pytest.raises(UserError, match=r"no trial was measured$"):
        write_results(toy_sweep(tmp_path / "new"))


@pytest.mark.parametrize("change", [{"bound": 0.02}, {"seed": 1}, {"stamp": "another model"}])
def test_a_study_belongs_to_one_sweep(tmp_path, change):
    run_sweep(toy_sweep(tmp_path), toy, 1)
    with pytest.raises(UserError, match="holds a sweep of another space, setting, seed or bound"):
        run_sweep(toy_sweep(tmp_path, **change), toy, 2)


def test_a_bound_on_nothing(tmp_path):
    with pytest.raises(UserError, match="sweep: kl is not measured; there are shift"):
        run_sweep(toy_sweep(tmp_path), lambda: lambda options: {"shift": 1.0}, 2)


def test_space():
    space = read_space({**SPACE, "epochs": {"low": 1, "high": 4}, "wide": {"low": 1, "high": 2.5, "step": 0.5}}, "sweep.space")
    assert space == {
        "tune.model.lr": FloatDistribution(1e-4, 1e-1, log=True),
        "select.amount": FloatDistribution(0.0, 1.0),
        "kind": CategoricalDistribution(["a", "b"]),
        "epochs": IntDistribution(1, 4),
        "wide": FloatDistribution(1, 2.5, step=0.5),
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "expected a list of choices, or numbers as low and high"),
        ([[1]], "expected a list of choices"),
        (3, "3; expected"),
        ({"low": 1}, "expected"),
        ({"low": "1e-4", "high": 1.0}, "YAML reads 1e-4 as text: write 1.0e-4"),
        ({"low": True, "high": 2}, "expected"),
        ({"low": 2, "high": 1}, r"sweep.space.lr: .*low <= high"),
        ({"low": 0.0, "high": 1.0, "log": True}, r"sweep.space.lr: .*low"),
        ({"low": 0.0, "high": 1.0, "logarithmic": True}, "expected"),
    ],
)
def test_what_is_no_space(values, said):
    with pytest.raises(UserError, match=said):
        read_space({"lr": values}, "sweep.space")
    with pytest.raises(UserError, match=r"sweep\.space: empty"):
        read_space({}, "sweep.space")


def test_nested():
    assert nested({"a.b.c": 1, "a.b.d": 2, "a.e": 3, "f": 4}) == {"a": {"b": {"c": 1, "d": 2}, "e": 3}, "f": 4}


def test_plot(tmp_path):
    sweep = toy_sweep(tmp_path)
    run_sweep(sweep, lambda: lambda o: {**shift_and_kl(o), **({"kl": math.inf} if o["kind"] == "a" else {})}, 20)
    trials, best = sweep.study.trials, sweep.best()
    finite = [t for t in trials if math.isfinite(t.value)]
    inside = [t for t in finite if t.user_attrs["measures"]["kl"] <= 0.01]
    assert 0 < len(inside) < len(finite) < 20
    panels = [ax for ax in plot_sweep(trials, sweep.space, sweep.bounds, best).axes if ax.axison]
    assert [ax.get_xlabel() for ax in panels] == ["kl (bound 0.01)", "tune.model.lr", "select.amount", "kind"]
    assert [ax.get_xscale() for ax in panels] == ["linear", "log", "linear", "linear"]
    assert [label.get_text() for label in panels[3].get_xticklabels()] == ["a", "b"]
    for ax in panels:
        dots, crosses, ring = ax.lines[:3]
        assert sorted(dots.get_ydata()) == sorted(t.value for t in inside)
        assert len(crosses.get_ydata()) == len(finite) - len(inside)
        assert list(ring.get_ydata()) == [best.value]
