"""``bad-neurons compare``: methods by seeds by strengths on one model, each cell kept under a digest of its inputs.

The configuration is that of a run (model, layers, records, and sections for the SAEs, the probe, the choice and the tuning, here the
defaults of all methods), with two sections more: ``compare`` and ``methods``. A method's ``correction``, ``select`` and ``tune``
win over the defaults.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from bad_neurons.artifacts import write_json, written_aside
from bad_neurons.compare.processes import room, worker_pool
from bad_neurons.compare.results import read_cell, write_results
from bad_neurons.compare.setting import OWN, Cell, Options, Setting, cells_of
from bad_neurons.data.splits import sources_of
from bad_neurons.errors import UserError
from bad_neurons.formats import CELL
from bad_neurons.lock import sole_writer
from bad_neurons.plan import Config, chosen_layers, merged, plan, read_run_config
from bad_neurons.run import CommandParser, run_stage

if TYPE_CHECKING:
    from bad_neurons.compare.workbench import Workbench

log = logging.getLogger(__name__)

# Options of the section `compare`, with their defaults; those of the first line go to the Setting as they are.
_MEASURED = ("side", "max_items", "text", "max_paragraphs", "dtype")
_PLAN: dict[str, Any] = {"seeds": [0], "examples": [0], "strengths": [0.5, 1.0]}
_TABLES: dict[str, Any] = {"reference": "random", "kl_levels": [0.002, 0.005, 0.01, 0.02], "kl_bound": 0.01}
# Options of a stage that all cells share, or that come from the cell itself.
_SPLIT = ("records", "validation", "test", "split_seed", "seed")
_DECIDED: dict[str, tuple[str, ...]] = {
    "tune.model": ("model", "dtype", "cache_gb", "cache_folder", "_loaded"),
    "tune.data": ("model", "max_records", *_SPLIT),
    "select": ("model", "text", "out", "control", "dtype", *_SPLIT),
    "lora": ("bench", "cell"),
    "steering": ("bench", "cell"),
}
_PREPARED = ("sae", "layers", "probe", "probe-residual")  # stages of a run that methods read from


def compare_command(arguments: list[str]) -> None:
    """``bad-neurons compare --config FILE [--out FOLDER] [--processes N] [--only METHOD]``."""
    parser = CommandParser(prog="bad-neurons compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, help="YAML file of the comparison, such as configs/compare-quick.yaml")
    parser.add_argument("--out", help="folder of the results, instead of the configuration's `out`")
    parser.add_argument(
        "--processes", type=int, default=0, help="cells at a time, each with its share of the cores; 0: as many as there is room for"
    )
    parser.add_argument("--only", action="append", metavar="METHOD", help="this method's cells alone; may be repeated")
    options = parser.parse_args(arguments)
    compare(Path(options.config), options.out, options.processes, options.only)


def compare(config_path: Path, out: str | None = None, processes: int = 0, only: Sequence[str] | None = None) -> Path:
    """Run the cells that are not there yet, and write the tables and plots of all that are.

    Returns:
        The folder of the results.

    Raises:
        UserError: a bad configuration, or cells that failed; the others are kept.
    """
    if processes < 0:
        raise UserError(f"--processes {processes}: 0 or more")
    config = read_run_config(config_path, ("compare", "methods"))
    folder = Path(out or config["out"])
    methods = methods_of(config, str(config_path))
    own = options_of(config, methods, str(config_path))
    if unknown := sorted(set(only or ()) - set(methods)):
        raise UserError(f"--only {unknown[0]}: no such method; there are {', '.join(methods)}")
    with sole_writer(folder):
        with written_aside(folder / "config.yaml") as aside:
            aside.write_text(config_path.read_text(encoding="utf-8"), encoding="utf-8")
        prepare(config, folder, methods)
        setting = setting_of(config, folder)
        every = list(cells_of(methods, *(own[name] for name in _PLAN)))
        cells = [cell for cell in every if cell.method in (only or methods)]
        failed = run_cells(setting, cells, folder / "cells", processes)
        write_results(folder, own, setting, every)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed, the others are kept; the first: {failed[0]}")
    return folder


def methods_of(config: Config, where: str) -> dict[str, Options]:
    """Each method's complete options: the run's sections ``select`` and ``tune`` under its own.

    Raises:
        UserError: no method, or an option that methods do not have.
    """
    known = ("correction", "select", "tune", "lora", "steering", *OWN)
    methods = config.get("methods") or {}
    if not methods:
        raise UserError(f"{where}: `methods` is missing; expected methods by name, such as `random: {{select: {{way: random}}}}`")
    for name, method in methods.items():
        if not isinstance(method, dict) or (unknown := sorted(set(method) - set(known))):
            what = f"has the option {unknown[0]!r}" if isinstance(method, dict) else f"is {method!r}"
            raise UserError(f"{where}: methods.{name} {what}; expected {', '.join(known)}")
    shared = {"select": config.get("select") or {}, "tune": config.get("tune") or {}}
    complete = {name: merged(shared, method) for name, method in methods.items()}
    for name, method in complete.items():
        check_options(method, f"{where}: methods.{name}")
    return complete


def check_options(options: Options, where: str) -> None:
    """Refuse what ``bad-neurons select``, the tuner, its data or its Trainer would not take, before anything runs.

    Raises:
        UserError: an unknown option; the message names it.
    """
    import lightning as L

    from bad_neurons.compare.corrections import lora, steering
    from bad_neurons.data.tuning import SycophancyDataModule
    from bad_neurons.selection.select import select
    from bad_neurons.tuning.module import NeuronTuner

    tune = options.get("tune") or {}
    takers: dict[str, tuple[Callable[..., Any], Any]] = {
        "tune.model": (NeuronTuner, tune.get("model")),
        "tune.data": (SycophancyDataModule, tune.get("data")),
        "tune.trainer": (L.Trainer, tune.get("trainer")),
        "select": (select, options.get("select")),
        "lora": (lora, options.get("lora")),
        "steering": (steering, options.get("steering")),
    }
    for section, (taker, given) in takers.items():
        if unknown := sorted(set(given or {}) - set(signature(taker).parameters)):
            raise UserError(f"{where}.{section}.{unknown[0]}: no such option")
        if decided := sorted(set(given or {}) & set(_DECIDED.get(section, ()))):
            raise UserError(
                f"{where}.{section}.{decided[0]}: the comparison decides this for all methods; give it at the top or in `compare`"
            )
    if unknown := sorted(set(tune) - {"model", "data", "trainer"}):
        raise UserError(f"{where}.tune.{unknown[0]}: no such section; expected model, data, trainer")


def options_of(config: Config, methods: Mapping[str, Options], where: str) -> Options:
    """The section ``compare``, complete.

    Raises:
        UserError: an unknown option, a list that is none, or a reference that is no method.
    """
    own = {**_PLAN, **_TABLES, **(config.get("compare") or {})}
    known = (*_PLAN, *_TABLES, "suites", *_MEASURED)
    if unknown := sorted(set(own) - set(known)):
        raise UserError(f"{where}: compare.{unknown[0]}: no such option; expected {', '.join(known)}")
    for name in (*_PLAN, "kl_levels"):
        if not isinstance(own[name], list) or not own[name] or not all(isinstance(value, int | float) for value in own[name]):
            raise UserError(f"{where}: compare.{name} {own[name]!r}: expected a list of numbers, such as {(_PLAN | _TABLES)[name]}")
    if own["reference"] not in methods:
        raise UserError(f"{where}: compare.reference {own['reference']!r}: no such method; there are {', '.join(methods)}")
    return own


def setting_of(config: Config, folder: Path) -> Setting:
    """What all cells share, from a configuration whose preparing stages are done."""
    own, records = config.get("compare") or {}, str(config.get("records", "embedded"))
    split = {name: config[name] for name in ("validation", "test", "split_seed") if name in config}
    sae = config["sae"] if isinstance(config.get("sae"), str) else str(folder / "sae")
    probes = [folder / name / "probe.safetensors" for name in ("probe", "probe-residual")]
    probe, residual = (str(path) if path.is_file() else None for path in probes)
    measured = {name: own[name] for name in _MEASURED if name in own}
    return Setting(
        model=str(config["model"]), layers=tuple(chosen_layers(config, folder)), records=records,
        suites=tuple(own.get("suites", sources_of(records))), **split, **measured,
        probe=probe, residual_probe=residual, sae=sae if probe else None,
    )  # fmt: skip


def prepare(config: Config, folder: Path, methods: dict[str, Options]) -> None:
    """Run the stages that some method reads from: the choice of layers, SAEs and probes."""
    decoded = any(method["select"].get("way", "probe") == "probe" for method in methods.values() if _chooses(method))
    wanted = _PREPARED if decoded else ("layers",)
    run = {key: value for key, value in config.items() if key not in ("compare", "methods", "sweep", "select")}
    for name, stage in plan(run, folder).items():
        if name in wanted:
            run_stage(stage(), folder, force=False)


def _chooses(method: Options) -> bool:
    return bool(method.get("correction", "neurons") == "neurons")


def run_cells(setting: Setting, cells: Sequence[Cell], folder: Path, processes: int = 0) -> list[str]:
    """Run the cells whose results are not in ``folder``; one line for each that failed."""
    stamp = setting.stamp
    missing = [cell for cell in cells if read_cell(cell.path(folder, stamp)) is None]
    log.info("%d cells, %d of them done already", len(cells), len(cells) - len(missing))
    if not missing:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    count = min(processes or room(), len(missing))
    failed = []
    with tqdm(total=len(missing), desc="cells", unit="cell") as bar:
        for cell, error in _outcomes(setting, missing, folder, stamp, count):
            bar.update()
            bar.set_postfix_str(cell.method)
            if error:
                failed.append(f"{cell.method}, seed {cell.seed}, {cell.examples or 'all'} examples: {error}")
                log.error("failed: %s", failed[-1])
    return failed


def _outcomes(setting: Setting, cells: Sequence[Cell], folder: Path, stamp: str, processes: int) -> Iterator[tuple[Cell, str | None]]:
    """Each cell as it is done, with the message of a failure."""
    if processes == 1:
        from bad_neurons.compare.workbench import Workbench

        bench = Workbench(setting)
        for cell in cells:
            try:
                _run_cell(bench, cell, cell.path(folder, stamp))
            except UserError as failure:
                yield cell, str(failure)
            else:
                yield cell, None
        return
    with worker_pool(processes, _start_worker, setting) as pool:
        waiting: dict[Future[None], Cell] = {pool.submit(_work, cell, cell.path(folder, stamp)): cell for cell in cells}
        for done in as_completed(waiting):
            failed = done.exception()
            if failed is not None and not isinstance(failed, UserError):
                pool.shutdown(cancel_futures=True)
                raise failed
            yield waiting[done], str(failed) if failed else None


_bench: Workbench | None = None  # of a worker process


def _start_worker(setting: Setting) -> None:
    global _bench
    from bad_neurons.compare.workbench import Workbench

    _bench = Workbench(setting)


def _work(cell: Cell, path: Path) -> None:
    assert _bench
    _run_cell(_bench, cell, path)


def _run_cell(bench: Workbench, cell: Cell, path: Path) -> None:
    write_json(path, {"format": CELL, "key": path.stem, **bench.run(cell)})
