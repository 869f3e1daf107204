"""A sweep: Optuna looks for the options that leave the least shift at bounded side effects.

The study lies in one journal file, without a server, so several processes can work on it and a stopped sweep goes on. What
is tried depends on the seed and on what has been tried before, never on when somebody stopped: one process that is
interrupted and goes on finds what an uninterrupted one finds.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from bad_neurons.artifacts import written_aside
from bad_neurons.errors import UserError
from bad_neurons.writing import lives

Options = dict[str, Any]
Objective = Callable[[Options], Mapping[str, float]]
Space = dict[str, BaseDistribution]

_TRIED, _FAILED = (TrialState.COMPLETE, TrialState.RUNNING), "error"
_CHOICES = bool | int | float | str | None


def read_space(space: Mapping[str, Any], where: str) -> Space:
    """Distributions by option from a configuration's section: a list of choices, or ``low`` and ``high``, maybe ``log`` or ``step``.

    Whole numbers on both ends mean whole numbers between them. An option is named as it would be typed, such as
    ``tune.model.lr``.

    Raises:
        UserError: nothing to search, or no range; the message names the option.
    """
    if not space:
        raise UserError(f"{where}: empty; expected options with what they may be, such as tune.model.lr: {{low: 1.0e-4, high: 1.0e-2}}")
    return {name: _distribution(values, f"{where}.{name}") for name, values in space.items()}


def _distribution(values: Any, where: str) -> BaseDistribution:
    try:
        if isinstance(values, list) and values and all(isinstance(value, _CHOICES) for value in values):
            return CategoricalDistribution(values)
        if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log", "step"}:
            ends = {type(values["low"]), type(values["high"])}
            if ends <= {int, float}:
                return IntDistribution(**values) if ends == {int} else FloatDistribution(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    raise UserError(f"{where}: {values!r}; expected a list of choices, or numbers as low and high (YAML reads 1e-4 as text: write 1.0e-4)")


def nested(options: Mapping[str, Any]) -> Options:
    """``{"tune.model.lr": 1}`` as ``{"tune": {"model": {"lr": 1}}}``, as configurations have it."""
    whole: Options = {}
    for name, value in options.items():
        *path, last = name.split(".")
        inner = whole
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return whole


@dataclass(frozen=True)
class Sweep:
    """What is looked for, and where the study lies.

    Attributes:
        folder: the study's file and the results.
        space: what each option may be.
        bounds: the most that a measure may be, by name, such as ``{"kl": 0.01}``.
        seed: seed of what is tried.
        stamp: identifies everything else that the measures depend on; a study belongs to one.
    """

    folder: Path
    space: Space
    bounds: Mapping[str, float]
    seed: int = 0
    stamp: str = ""

    @cached_property
    def study(self) -> optuna.Study:
        """The study, begun where there is none.

        Raises:
            UserError: the folder holds the study of another sweep.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self.folder / "study.log"), JournalFileOpenLock(str(self.folder / "study.log"))))
        space = {name: distribution_to_json(values) for name, values in self.space.items()}
        asked = {"space": space, "bounds": dict(self.bounds), "seed": self.seed, "stamp": self.stamp}
        with self.alone():
            study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
            if not study.trials and not study.user_attrs:
                study.set_user_attr("asked", asked)
        if study.user_attrs.get("asked") != asked:
            raise UserError(f"{self.folder}: holds a sweep of another space, setting, seed or bound; give another folder, or remove it")
        return study

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process claims a trial meanwhile."""
        lock = JournalFileOpenLock(str(self.folder / "claim"))
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def tried(self) -> list[FrozenTrial]:
        """Trials that count: done, failed by their options, or running."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state in _TRIED or _FAILED in t.user_attrs]

    def best(self) -> FrozenTrial | None:
        """The trial with the least shift within the bounds; None where there is none."""
        try:
            return self.study.best_trial
        except ValueError:
            return None

    def claim(self, trials: int) -> Trial | None:
        """The next thing to try; None where ``trials`` of them are done or running."""
        study = self.study  # takes the lock where it opens it
        with self.alone():
            count = len(self.tried())
            if count >= trials:
                return None
            # A new sampler a trial, seeded by what has been tried: going on is the same as never having stopped.
            study.sampler = optuna.samplers.TPESampler(seed=1_000_003 * self.seed + count)
            trial = study.ask(self.space)
            trial.set_user_attr("process", f"{platform.node()}:{os.getpid()}")
            return trial

    def measure(self, trial: Trial, objective: Objective) -> None:
        """Try a claimed trial. Options that cannot be tried are a failed trial with the message, and no end of the sweep.

        Raises:
            UserError: a bound is on something that is not measured.
        """
        start = time.monotonic()
        try:
            measures = dict(objective(nested(trial.params)))
        except UserError as error:
            trial.set_user_attr(_FAILED, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return
        if missing := sorted({"shift", *self.bounds} - set(measures)):
            raise UserError(f"sweep: {missing[0]} is not measured; there are {', '.join(sorted(measures))}")
        finite = all(math.isfinite(measures[name]) for name in ("shift", *self.bounds))  # a rate that is too high ends in NaN
        for name, bound in self.bounds.items():
            trial.set_constraint(name, measures[name] - bound if finite else math.inf)
        trial.set_user_attr("measures", measures)
        trial.set_user_attr("seconds", round(time.monotonic() - start, 1))
        self.study.tell(trial, abs(measures["shift"]) if finite else math.inf)

    def requeue_dead(self) -> None:
        """What was running in a process of this machine that is no more is tried again."""
        study = self.study
        with self.alone():
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                node, _, pid = str(trial.user_attrs.get("process", "")).rpartition(":")
                if not pid or (node == platform.node() and not _works(int(pid))):
                    study.tell(trial.number, state=TrialState.FAIL)
                    study.enqueue_trial(trial.params)


def _works(pid: int) -> bool:
    """Whether a process may be working on a trial: it lives, and is not this one, which is not yet."""
    return lives(pid) and pid != os.getpid()


def write_results(sweep: Sweep) -> None:
    """``sweep.csv`` (a row a trial), ``sweep.png``, and ``best.yaml`` where a trial is within the bounds.

    Raises:
        UserError: nothing was tried, or no trial could be measured.
    """
    from bad_neurons.compare.sweep_plots import plot_sweep

    done = [t for t in sweep.study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE or _FAILED in t.user_attrs]
    measured = [t for t in done if t.state is TrialState.COMPLETE]
    with written_aside(sweep.folder / "sweep.csv") as aside:
        aside.write_text(_csv(sweep, done), encoding="utf-8")
    if not measured:
        raise UserError(f"{sweep.folder}: no trial was measured" + (f"; the first failed: {done[0].user_attrs[_FAILED]}" if done else ""))
    best = sweep.best()
    if best is not None:
        with written_aside(sweep.folder / "best.yaml") as aside:
            aside.write_text(_yaml(sweep, best, len(measured)), encoding="utf-8")
    with written_aside(sweep.folder / "sweep.png") as aside:
        plot_sweep(measured, sweep.space, sweep.bounds, best).savefig(aside, format="png", dpi=160)


def _csv(sweep: Sweep, trials: list[FrozenTrial]) -> str:
    measures = sorted({name for t in trials for name in t.user_attrs.get("measures", {})})
    text = io.StringIO()
    table = csv.DictWriter(text, ["trial", *sweep.space, *measures, "within_bounds", "seconds", "error"], lineterminator="\n")
    table.writeheader()
    for trial in trials:
        table.writerow(
            {
                "trial": trial.number,
                **trial.params,
                **trial.user_attrs.get("measures", {}),
                "within_bounds": within(trial),
                "seconds": trial.user_attrs.get("seconds", ""),
                "error": trial.user_attrs.get(_FAILED, ""),
            }
        )
    return text.getvalue()


def within(trial: FrozenTrial) -> bool:
    """Whether a trial was measured and keeps all bounds."""
    return trial.state is TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())


def _yaml(sweep: Sweep, best: FrozenTrial, count: int) -> str:
    found = ", ".join(f"{name} {value:.4g}" for name, value in best.user_attrs["measures"].items())
    bounds = ", ".join(f"{name} at most {bound:g}" for name, bound in sweep.bounds.items())
    head = f"# Trial {best.number}, the best of {count} with {bounds or 'no bound'}: {found}\n"
    return head + str(yaml.safe_dump(nested(best.params), sort_keys=False))
