"""``bad-neurons run``: all stages of one configuration, each skipped when nothing that it reads has changed.

The configuration holds what stages share (model, layers, records, split) once, and a section a stage with that stage's
own options. From it a complete configuration is made for every stage and kept beside its results, so each can be run
again alone: ``bad-neurons tune fit --config runs/quickstart/tuning/config.yaml``.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bad_neurons import __version__
from bad_neurons.artifacts import digest_json, digest_path, read_json, write_json, written_aside
from bad_neurons.errors import UserError
from bad_neurons.formats import RESULTS, STAGE
from bad_neurons.lock import sole_writer
from bad_neurons.memory import enough_memory
from bad_neurons.models.load import model_stamp
from bad_neurons.plan import Config, Stage, plan, read_run_config
from bad_neurons.ranks import leave
from bad_neurons.sealed import Format
from bad_neurons.writing import remove

log = logging.getLogger(__name__)


class CommandParser(ArgumentParser):
    """A parser whose complaints are one line, like everybody else's."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise UserError(f"{self.prog.removeprefix('bad-neurons ')}: {message}")


def run_command(arguments: list[str]) -> None:
    """``bad-neurons run --config FILE [--out FOLDER] [--force STAGE]``."""
    parser = CommandParser(prog="bad-neurons run", description=run.__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run, such as configs/quickstart.yaml")
    parser.add_argument("--out", help="folder of the results, instead of the configuration's `out`")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="run this stage even if nothing changed; may be repeated"
    )
    options = parser.parse_args(arguments)
    run(Path(options.config), options.out, options.force)


def run(config_path: Path, out: str | None = None, force: list[str] | None = None) -> Config:
    """Run all stages of a configuration; stages whose inputs did not change are skipped."""
    config = read_run_config(config_path)
    folder = Path(out or config["out"])
    stages = plan(config, folder)
    if unknown := set(force or []) - set(stages):
        raise UserError(f"--force {sorted(unknown)[0]}: no such stage; there are {', '.join(stages)}")
    with sole_writer(folder):
        return _run(config_path, folder, stages, force or [])


def _run(config_path: Path, folder: Path, stages: dict[str, Callable[[], Stage]], force: list[str]) -> Config:
    with written_aside(folder / "config.yaml") as aside:
        aside.write_text(config_path.read_text(encoding="utf-8"), encoding="utf-8")
    ran = {name: run_stage(stage(), folder, name in force) for name, stage in stages.items()}
    if any(now for _, now in ran.values()) or not _is_finished(folder):
        results = _finish(folder, {name: seconds for name, (seconds, _) in ran.items()})
    else:
        results = read_json(folder / "results.json", RESULTS)
    if not ran["evaluation"][1]:  # that stage shows the table itself
        from rich.console import Console

        from bad_neurons.report.terminal import results_table

        Console().print(results_table(results))
    log.info("results: %s\nreport:  %s", folder / "results.json", folder / "report.html")
    return results


def stage_key(stage: Stage) -> str:
    """Digest of all that a stage's result depends on: version, command, configuration, model, input files."""
    return digest_json([__version__, stage.command, stage.config, _model_stamp(stage.config), [digest_path(p) for p in stage.inputs]])


def run_stage(stage: Stage, folder: Path, force: bool) -> tuple[float, bool]:
    """Run or skip one stage; seconds that it took when it last ran, and whether that was now."""
    stamp = folder / stage.name / "stage.json"
    started = folder / stage.name / "started.json"
    key = stage_key(stage)
    done = _trusted(stamp, STAGE)
    if not force and done.get("key") == key and _unchanged(stage, done["outputs"]):
        _clear(stage, folder)  # where the process was killed at the very end
        log.info("%-15s unchanged, skipped (took %.0f s when it ran)", stage.name, done["seconds"])
        return float(done["seconds"]), False
    log.info("%-15s runs: bad-neurons %s", stage.name, " ".join(stage.command))
    interrupted = not stamp.is_file() and _trusted(started, STAGE).get("key") == key
    remove(stamp)  # what it vouches for is about to change
    if not interrupted:
        _forget_checkpoints(stage, folder)  # of another configuration, or of a fit that ended
    write_json(started, {"format": STAGE, "key": key})
    start = time.monotonic()
    _call(stage, folder, resume=interrupted and stage.resume is not None and stage.resume.is_file())
    seconds = round(time.monotonic() - start, 1)
    outputs = [digest_path(path) for path in stage.outputs]
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(stamp, {"format": STAGE, "key": key, "seconds": seconds, "finished": finished, "outputs": outputs})
    _clear(stage, folder)
    return seconds, True


def _clear(stage: Stage, folder: Path) -> None:
    """Remove what a stage needs only while it is not done."""
    if not stage.kept:
        _forget_checkpoints(stage, folder)
    remove(folder / stage.name / "started.json")


def _forget_checkpoints(stage: Stage, folder: Path) -> None:
    """Remove the checkpoint from which the stage would go on, and those that Lightning writes under SLURM (hpc_ckpt_<n>)."""
    for path in ([stage.resume] if stage.resume else []) + sorted((folder / stage.name).glob("hpc_ckpt_*.ckpt")):
        remove(path)


def _trusted(path: Path, form: Format) -> Config:
    """What was written when the work was done; empty where it was not, or where the file cannot be relied on."""
    if not path.is_file():
        return {}
    try:
        found: Config = read_json(path, form)
    except UserError as error:
        log.warning("%s; it is made again", error)
        return {}
    return found


def _unchanged(stage: Stage, outputs: Sequence[str]) -> bool:
    """Whether what a stage wrote is there as it was written."""
    for path, digest in zip(stage.outputs, outputs, strict=True):
        if path.is_file() and digest_path(path) != digest:
            log.warning("%s: damaged or changed since the stage wrote it; the stage runs again", path)
            return False
    return all(path.is_file() for path in stage.outputs)


def _call(stage: Stage, folder: Path, resume: bool) -> None:
    """Write the stage's configuration and call its command in this process, as if it had been typed."""
    path = folder / stage.name / "config.yaml"
    with written_aside(path) as aside:
        text = yaml.safe_dump(stage.config, sort_keys=False, allow_unicode=True)
        aside.write_text(f"# bad-neurons {' '.join(stage.command)} --config {path}\n{text}", encoding="utf-8")
    arguments = [*stage.command[1:], "--config", str(path)]
    if resume:
        log.info("%-15s goes on from %s", stage.name, stage.resume)
        arguments += ["--ckpt_path", str(stage.resume)]
    from bad_neurons import stages
    from bad_neurons.cli import COMMANDS

    command: Callable[[list[str]], None] = getattr(stages, COMMANDS[stage.command[0]][1])
    typed, sys.argv = sys.argv, [sys.argv[0], stage.command[0], *arguments]  # Lightning starts further ranks with sys.argv
    try:
        with enough_memory(stage.command[0], section=stage.command[0]):
            command(arguments)
    finally:
        sys.argv = typed
        leave()


def _model_stamp(config: Config) -> Any:
    model = (
        config["model"] if isinstance(config.get("model"), str) else {**config.get("model", {}), **config.get("data", {})}.get("model", "")
    )
    return model_stamp(str(model))


def _is_finished(folder: Path) -> bool:
    """Whether results and report are there as this version writes them."""
    results = folder / "results.json"
    if not results.is_file() or not (folder / "report.html").is_file():
        return False
    return bool(_trusted(results, RESULTS).get("versions", {}).get("bad-neurons") == __version__)


def _finish(folder: Path, seconds: dict[str, float]) -> Config:
    """Write results.json and report.html."""
    from bad_neurons.report.html import write_report

    results: Config = {
        "name": folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("bad-neurons", "torch", "lightning", "transformers", "sae-lens")},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
        **read_json(folder / "evaluation" / "results.json", RESULTS),
        "seconds": seconds,
    }
    write_json(folder / "results.json", results)
    write_report(folder)
    return results


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
