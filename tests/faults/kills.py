"""Kill a run again and again, anywhere, and see that the same command ends with the same bits as a run that nobody killed.

    python tests/faults/kills.py --kills 100 --seed 0                            # a tiny model, all stages: minutes
    python tests/faults/kills.py --kills 10 --model packaged:gemma-3-270m        # a real one

Half of the kills come at a random time of a stage, by SIGKILL to the whole process group. The other half come inside a write: before
what was written is synced, with a part of it lost as in a power cut, between sync and rename, or right behind the rename. Attempts
are forked from a process that has imported everything, so that a kill costs what it interrupts and little more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import lightning  # noqa: F401 (imported before the first fork, as all below)
import sae_lens  # noqa: F401
import torch
import yaml

import bad_neurons.evaluation.evaluate
import bad_neurons.probe.choose
import bad_neurons.probe.compare
import bad_neurons.probe.module
import bad_neurons.run
import bad_neurons.sae.harvest
import bad_neurons.selection.select
import bad_neurons.stages
import bad_neurons.tuning.module
from bad_neurons import callbacks  # noqa: F401
from bad_neurons.artifacts import digest_path, read_json, write_json
from bad_neurons.cli import main as command_line
from bad_neurons.report.html import write_report
from helpers import tiny_run_config

STAGES = ["sae", "layers", "probe", "probe-residual", "probes", "selection", "tuning", "evaluation", "report"]
_OF_TIME = ("seconds", "finished", "created")  # what says when and how long, and nothing of the result


class Kill(NamedTuple):
    """Where a run is to be killed.

    Attributes:
        stage: in which stage.
        write: inside a write, or at a moment.
        when: share of the stage's writes, or of its seconds, that come before.
    """

    stage: str
    write: bool
    when: float


class Reference(NamedTuple):
    """The run that nobody killed.

    Attributes:
        folder: where it lies.
        seconds: what each stage took.
        writes: how often each stage synced or renamed something.
    """

    folder: Path
    seconds: dict[str, float]
    writes: dict[str, int]


def config_of(work: Path, model: str | None) -> Path:
    """The run, with a checkpoint every few steps; of a tiny model where none is named."""
    run = work / "run"

    def trainer(stage: str, every: int, **options: Any) -> dict[str, Any]:
        keep = {"dirpath": str(run / stage / "checkpoints"), "every_n_train_steps": every}
        return {"callbacks": [{"class_path": "bad_neurons.callbacks.MidEpochCheckpoint", "init_args": keep}], **options}

    if model is None:
        sae = {"layers": [1, 2, 3], "text": [], "max_tokens": 700, "batch_size": 64}
        tuning = {"batch_tokens": 200, "retention_rows": 1, "retention_tokens": 16}
        return tiny_run_config(
            work,
            layers={"greedy": {"features": "sae", "budget": 2}},
            probes={"pools": ["max"]},
            sae={"model": {"d_sae": 32, "k": 4}, "data": sae, "trainer": trainer("sae", 3, max_epochs=2)},
            tune={"data": tuning, "trainer": trainer("tuning", 2, max_epochs=2)},
        )
    config = {
        "out": str(run),
        "model": model,
        "layers": [4, 6],
        "records": "embedded",
        "sae": {
            "model": {"d_sae": 512, "k": 16},
            "data": {"max_tokens": 12_000, "batch_size": 256},
            "trainer": trainer("sae", 20, max_epochs=1),
        },
        "probe": {"data": {"max_records": 100}},
        "probes": {"max_records": 60, "pools": ["max"]},
        "tune": {"data": {"max_records": 48, "retention_rows": 1}, "trainer": trainer("tuning", 4, max_epochs=1, limit_val_batches=2)},
        "evaluate": {"optional_suites": [], "max_items": 12, "max_paragraphs": 4, "answers": 2},
    }
    work.mkdir(parents=True, exist_ok=True)
    (work / "run.yaml").write_text(yaml.safe_dump(config))
    return work / "run.yaml"


def start(config: Path, log: Path, count: Path | None = None, kill: tuple[str, int] | None = None, seed: int = 0) -> int:
    """Fork a process that runs the command; gives its number.

    Args:
        config: the run.
        log: where its output goes.
        count: where it writes the number of writes of each stage in the end.
        kill: stage and number of the write in which it kills itself; in the next write where the stage has fewer.
        seed: how that write is cut off.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        torch.set_num_threads(1)  # makes torch's thread pool anew, which it does behind a fork, but not if several threads ask at once
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        counts = _watch_writes(kill, random.Random(seed))
        code = command_line(["run", "--config", str(config)])
        if count:
            count.write_text(json.dumps(counts))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _watch_writes(kill: tuple[str, int] | None, rng: random.Random) -> Counter[str]:
    """Count what this process syncs and renames, by stage, and die in one of them."""
    counts: Counter[str] = Counter()
    stage = ["start"]
    fsync, replace, call, finish = os.fsync, os.replace, bad_neurons.run._call, bad_neurons.run._finish

    def due() -> bool:
        counts[stage[0]] += 1
        if kill is None or stage[0] == "start":
            return False
        return counts[stage[0]] >= kill[1] if stage[0] == kill[0] else STAGES.index(stage[0]) > STAGES.index(kill[0])

    def die() -> NoReturn:
        os.killpg(0, signal.SIGKILL)
        raise AssertionError

    def watched_fsync(handle: int) -> None:
        if due():
            if stat.S_ISREG(os.fstat(handle).st_mode) and rng.random() < 0.7:  # what is not synced may be lost in part
                os.truncate(f"/proc/self/fd/{handle}", rng.randrange(os.fstat(handle).st_size + 1))
            die()
        fsync(handle)

    def watched_replace(source: Any, target: Any) -> None:
        if due():
            if rng.random() < 0.5:
                replace(source, target)
            die()
        replace(source, target)

    def watched_call(of: Any, *args: Any, **kwargs: Any) -> None:
        stage[0] = of.name
        call(of, *args, **kwargs)

    def watched_finish(*args: Any) -> Any:
        stage[0] = "report"
        return finish(*args)

    os.fsync, os.replace = watched_fsync, watched_replace
    bad_neurons.run._call, bad_neurons.run._finish = watched_call, watched_finish
    return counts


def reference_run(config: Path, work: Path) -> Reference:
    """Run once without a kill and put the result aside; later runs are made in the same place."""
    run, counts = work / "run", work / "writes.json"
    shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    _, status = os.waitpid(start(config, work / "reference.log", counts), 0)
    if status:
        raise SystemExit(f"the run that nobody kills failed:\n{(work / 'reference.log').read_text()}")
    whole = time.monotonic() - began
    seconds = json.loads((run / "results.json").read_text())["seconds"]
    seconds["report"] = max(0.2, whole - sum(seconds.values()))
    target = work / "reference"
    shutil.rmtree(target, ignore_errors=True)
    run.rename(target)
    _without_time(target)
    return Reference(target, seconds, json.loads(counts.read_text()))


def attempt(config: Path, work: Path, kill: Kill | None, reference: Reference, seed: int) -> str | None:
    """Run once; the stage in which it was killed, or None where it ended.

    Raises:
        SystemExit: it ended with an error.
    """
    log = work / "attempt.log"
    log.unlink(missing_ok=True)
    at = None
    if kill and kill.write:
        at = (kill.stage, 1 + int(kill.when * reference.writes.get(kill.stage, 1)))
    pid = start(config, log, kill=at, seed=seed)
    due = None
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if kill and not kill.write and due is None and _reached(kill.stage, work, log):
            due = time.monotonic() + kill.when * max(0.05, reference.seconds.get(kill.stage, 0.0))
        if due is not None and time.monotonic() >= due:
            os.killpg(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    if os.WIFSIGNALED(done[1]):
        return _stage_now(work / "run")
    if os.WEXITSTATUS(done[1]):
        raise SystemExit(f"a run that goes on failed with status {os.WEXITSTATUS(done[1])}:\n{log.read_text()}")
    return None


def _reached(stage: str, work: Path, log: Path) -> bool:
    if (work / "run" / "evaluation" / "stage.json").is_file():
        return True
    running = {f"{later:15} runs:" for later in STAGES[STAGES.index(stage) :]}
    return log.is_file() and any(line[:21] in running for line in log.read_text(errors="replace").splitlines())


def _stage_now(run: Path) -> str:
    """Where a run stands, by its files."""
    for stage in STAGES[:-1]:
        if (run / stage / "started.json").is_file():
            return stage
    return "report" if (run / "evaluation" / "stage.json").is_file() else "between stages"


def plan(rng: random.Random, stages: list[str], kills: int) -> Iterator[Kill]:
    """Kills in the order of the stages: as many in each, and the rest by chance."""
    each, rest = divmod(kills, len(stages))
    chosen = Counter(dict.fromkeys(stages, each)) + Counter(rng.sample(stages, rest))
    for stage in stages:
        for _ in range(chosen[stage]):
            yield Kill(stage, rng.random() < 0.5, rng.random())


def differences(reference: Path, run: Path) -> list[str]:
    """Files that are not the same in two runs; of what says when and how long, the rest is compared."""
    before = (run / "report.html").read_bytes()
    write_report(run)
    wrong = [] if (run / "report.html").read_bytes() == before else ["report.html (is not what the results say)"]
    _without_time(run)
    ours, theirs = ({p.relative_to(folder).as_posix() for p in folder.rglob("*")} for folder in (run, reference))
    wrong += sorted(f"{name} (in one of them alone)" for name in ours ^ theirs)
    return wrong + sorted(name for name in ours & theirs if not _same(run / name, reference / name))


def _without_time(run: Path) -> None:
    for path in (run / "evaluation" / "results.json", run / "results.json", *run.glob("*/stage.json")):
        content = {key: value for key, value in read_json(path, "a run's results").items() if key not in _OF_TIME}
        if path.parent.name == "evaluation" and "outputs" in content:
            content["outputs"] = [digest_path(path.parent / "results.json")]  # which had a time in it
        write_json(path, content)
    write_report(run)


def _same(one: Path, other: Path) -> bool:
    if one.is_dir() or one.read_bytes() == other.read_bytes():
        return True
    if one.suffix != ".ckpt":
        return False
    return _equal(*(torch.load(path, weights_only=True) for path in (one, other)))


def _equal(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same; equal ones need not be equal bytes, since pickle shares equal objects as it meets them."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def kill_and_compare(work: Path, kills: int, seed: int, model: str | None = None, together: int = 14) -> bool:
    """All of it; whether every run that was killed ended as the one that was not."""
    torch.set_num_threads(1)
    config = config_of(work, model)
    reference = reference_run(config, work)
    stages = [stage for stage in STAGES if (reference.folder / stage).is_dir() or stage == "report"]
    _say(f"the run that nobody kills: {sum(reference.seconds.values()):.1f} s, {sum(reference.writes.values())} writes")
    rng, hit, good, began = random.Random(seed), Counter[str](), 0, time.monotonic()
    while sum(hit.values()) < kills:
        shutil.rmtree(work / "run", ignore_errors=True)
        here = Counter[str]()
        for kill in plan(rng, stages, min(together, kills - sum(hit.values()))):
            stage = attempt(config, work, kill, reference, rng.randrange(2**32))
            if stage is None:
                break  # too late: it had ended
            here[f"{stage}, {'write' if kill.write else 'moment'}"] += 1
        attempt(config, work, None, reference, 0)
        wrong = differences(reference.folder, work / "run")
        hit += here
        good += 0 if wrong else sum(here.values())
        _say(f"{sum(here.values())} kills, then {'the same bits' if not wrong else 'other bits: ' + '; '.join(wrong)}")
        if wrong:
            shutil.copytree(work / "run", work / f"wrong-{sum(hit.values())}", dirs_exist_ok=True)
    for name in [*stages, "between stages"]:
        _say(f"{name:15} {hit[name + ', moment']:3} at a moment {hit[name + ', write']:3} inside a write")
    _say(f"{good} of {sum(hit.values())} kills ended with the same bits, {time.monotonic() - began:.0f} s")
    return good == sum(hit.values())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="of where they come")
    parser.add_argument("--together", type=int, default=14, help="kills of one run before it is compared")
    parser.add_argument("--model", help="a model instead of a tiny one, such as packaged:gemma-3-270m")
    parser.add_argument("--work", type=Path, help="folder to work in, kept afterwards; a temporary one where none is given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bad-neurons-faults-") as folder:
        work = (options.work or Path(folder)).resolve()
        return 0 if kill_and_compare(work, options.kills, options.seed, options.model, options.together) else 1


if __name__ == "__main__":
    sys.exit(main())
