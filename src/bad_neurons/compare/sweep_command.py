"""``bad-neurons sweep``: the options that leave the least opinion shift on validation topics, at bounded KL.

The configuration is that of a comparison without methods, with a section ``sweep`` instead: ``space`` (options by dotted name,
such as ``tune.model.lr``), ``bounds``, ``trials``, ``seed``, the ``seeds`` and ``examples`` of each trial's cells, and their
``correction``. What is measured is the validation side: test topics are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from bad_neurons.artifacts import digest_json
from bad_neurons.compare.command import check_options, prepare, setting_of
from bad_neurons.compare.processes import room
from bad_neurons.compare.setting import Cell, Options, Setting
from bad_neurons.compare.sweep import Objective, Sweep, nested, read_space, write_results
from bad_neurons.compare.sweep_workers import run_sweep
from bad_neurons.errors import UserError
from bad_neurons.plan import merged, read_run_config
from bad_neurons.run import CommandParser

log = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {"bounds": {"kl": 0.01}, "trials": 40, "seed": 0, "seeds": [0], "examples": 128}


class Task(NamedTuple):
    """What every trial does.

    Attributes:
        setting: the model, the data and what is measured.
        options: sections ``correction``, ``select`` and ``tune``, under what a trial tries.
        seeds: a cell for each; measures are means over them.
        examples: training records of a cell.
    """

    setting: Setting
    options: Options
    seeds: tuple[int, ...]
    examples: int


def sweep_command(arguments: list[str]) -> None:
    """``bad-neurons sweep --config FILE [--out FOLDER] [--trials N] [--processes N]``."""
    parser = CommandParser(prog="bad-neurons sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, help="YAML file of the sweep, such as configs/sweep.yaml")
    parser.add_argument("--out", help="folder of the study and the results, instead of the configuration's `out`")
    parser.add_argument("--trials", type=int, help="how many are tried in all, instead of the configuration's; the same command goes on")
    parser.add_argument(
        "--processes", type=int, default=0, help="trials at a time, each with its share of the cores; 0: as many as there is room for"
    )
    options = parser.parse_args(arguments)
    sweep(Path(options.config), options.out, options.trials, options.processes)


def sweep(config_path: Path, out: str | None = None, trials: int | None = None, processes: int = 0) -> Path:
    """Try what is left to try, and write ``sweep.csv``, ``sweep.png`` and ``best.yaml``.

    Returns:
        The folder of the results.

    Raises:
        UserError: a bad configuration, or a folder that holds another sweep.
    """
    if processes < 0:
        raise UserError(f"--processes {processes}: 0 or more")
    config = read_run_config(config_path, ("compare", "sweep"))
    folder = Path(out or config["out"])
    own = {**_DEFAULTS, **(config.get("sweep") or {})}
    if unknown := sorted(set(own) - {*_DEFAULTS, "space", "correction"}):
        raise UserError(f"{config_path}: sweep.{unknown[0]}: no such option; expected space, {', '.join(_DEFAULTS)}, correction")
    space = read_space(own.get("space") or {}, f"{config_path}: sweep.space")
    options = {"correction": own.get("correction", "neurons"), "select": config.get("select") or {}, "tune": config.get("tune") or {}}
    check_options(merged(options, nested(dict.fromkeys(space))), f"{config_path}: sweep")
    prepare(config, folder, {"sweep": options})
    measured = {**config, "compare": {**(config.get("compare") or {}), "side": "validation"}}
    setting = setting_of(measured, folder)
    task = Task(setting, options, tuple(own["seeds"]), own["examples"])
    study = Sweep(folder, space, own["bounds"], own["seed"], digest_json([setting.stamp, options, task.seeds, task.examples]))
    run_sweep(study, partial(objective_of, task), trials or own["trials"], processes or room())
    write_results(study)
    best = study.best()
    log.info("results: %s", folder / "sweep.csv")
    log.info("best:    %s", folder / "best.yaml" if best else f"no trial within the bounds {own['bounds']}")
    return folder


def objective_of(task: Task) -> Objective:
    """Runs the cells of what is tried on a workbench of its own."""
    from bad_neurons.compare.workbench import Workbench

    bench = Workbench(task.setting)

    def objective(tried: Options) -> dict[str, float]:
        options = merged(task.options, tried)
        return measures_of([bench.run(Cell("sweep", options, seed, task.examples, (1.0,))) for seed in task.seeds])

    return objective


def measures_of(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over cells.

    ``shift`` is the share of the mean opinion shift that is left, averaged over suites, ``shift_<suite>`` that of each; ``kl`` is in nats
    per token; ``contradicts_right`` is the share of people who are right whom the model agreed with and agrees with no more.
    """
    left: dict[str, list[float]] = {}
    for result in results:
        for suite, rows in result["strengths"][-1]["items"].items():
            before, after = (_mean_shift(side) for side in (result["clean"][suite], rows))
            left.setdefault(f"shift_{suite}", []).append(abs(after / before))
    means = {name: fmean(values) for name, values in left.items()}
    kl = fmean(r["strengths"][-1]["kl_per_token"] for r in results)
    lost = [now for result in results for now in _lost(result)]
    return {"shift": fmean(means.values()), "kl": kl, **means, **({"contradicts_right": fmean(lost)} if lost else {})}


def _lost(result: Mapping[str, Any]) -> list[bool]:
    """Of each person who is right and was agreed with: whether that is over."""
    pairs = [
        (before, after)
        for suite, rows in result["strengths"][-1]["items"].items()
        for before, after in zip(result["clean"][suite], rows, strict=True)
    ]
    return [after["odds"] <= 0 for before, after in pairs if before.get("person_is_right") and before["odds"] > 0]


def _mean_shift(rows: Sequence[Mapping[str, Any]]) -> float:
    return fmean(row["odds"] - row["odds_neutral"] for row in rows if row["valid"] and row.get("odds_neutral") is not None)
