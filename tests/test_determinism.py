"""The seed fixes everything: two processes, in which Python orders its sets differently, write the same bits in every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

HERE = Path(__file__).parent
CLOCK = ("seconds", "created", "finished", "machine", "date")  # parts of names of what a clock or a machine says
OWN = ("stage.json", "started.json", "report.html", "config.yaml")  # of a clock, or a copy of the input
LISTED = (".json", ".jsonl", ".csv", ".parquet", ".md", ".png", ".safetensors", ".ckpt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> dict[str, Path]:
    """Folders that two processes made, each at the same place and moved away behind it, by what Python made of ``hash('a')``."""
    folder = tmp_path_factory.mktemp("determinism")
    found = {}
    for number in ("1", "2"):
        here = folder / "here"
        here.mkdir()
        env = {**os.environ, "PYTHONHASHSEED": number, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(["", str(HERE), *sys.path])}
        done = subprocess.run(
            [sys.executable, str(HERE / "every_stage.py")], cwd=here, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[done.stdout.splitlines()[-1]] = here.rename(folder / number)
    return found


def timeless(value: Any) -> Any:
    """JSON without what a clock says."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if not any(word in key for word in CLOCK)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """What is to be the same."""
    if path.name == "cfg.json":  # of an SAE: what reads it takes the digest of its bytes
        return path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        whole = [json.loads(line) for line in ([path.read_text()] if path.suffix == ".json" else path.read_text().splitlines())]
        for one in whole:
            if isinstance(one, dict):
                one.pop("digest", None)  # of all the rest, what a clock says included
        return timeless(whole)
    if path.suffix in (".csv", ".parquet"):
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        return table[[name for name in table if not any(word in name for word in CLOCK)]].to_csv()
    if path.suffix == ".md":
        return [line for line in path.read_text().splitlines() if not any(word in line for word in CLOCK)]
    if path.suffix == ".ckpt":
        return repr(torch.load(path, weights_only=True))
    return path.read_bytes()


def files(folder: Path) -> dict[str, Path]:
    """By name; a comparison's cell without the digest in its name, which is that of the model's files' times as well."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file() and path.name not in OWN}
    return {(n.with_name(n.name.rsplit("-", 1)[0]) if n.parent.name == "cells" else n).as_posix(): path for n, path in found.items()}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the files that are not in both, or not the same in both."""
    mine, theirs = files(one), files(other)
    both = mine.keys() & theirs.keys()
    return sorted(mine.keys() ^ theirs.keys() | {name for name in both if content(mine[name]) != content(theirs[name])})


def test_a_difference_would_be_seen(tmp_path):
    for name, value in (("one", 1.0), ("other", 1.0 + 2**-52)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text(json.dumps({"x": value, "seconds": value}))
        (tmp_path / name / "b.json").write_text(json.dumps({"seconds": value}))
        (tmp_path / name / "c.safetensors").write_bytes(bytes([0, int(value > 1)]))
        torch.save({"w": torch.tensor(value, dtype=torch.float64)}, tmp_path / name / "d.ckpt")
        pd.DataFrame({"x": [value], "train_seconds": [value]}).to_parquet(tmp_path / name / "e.parquet")
        pd.DataFrame({"train_seconds": [value]}).to_csv(tmp_path / name / "f.csv")
    (tmp_path / "one" / "g.md").write_text("only here")
    torch.set_printoptions(precision=17)
    try:
        assert differing(tmp_path / "one", tmp_path / "other") == ["a.json", "c.safetensors", "d.ckpt", "e.parquet", "g.md"]
    finally:
        torch.set_printoptions(profile="default")


@pytest.mark.timeout(1800)
def test_two_processes_write_the_same_bits(processes):
    assert len(processes) == 2  # they do order sets differently
    one, other = processes.values()
    names = set(files(one))
    stages = ("sae", "layers", "probe", "probe-residual", "probes", "selection", "tuning", "evaluation")
    for stage in stages:
        assert any(name.startswith(f"tiny/run/{stage}/") for name in names), stage
    kinds = (
        "tuning/delta.safetensors",
        "checkpoints/last.ckpt",
        "metrics.csv",
        "chosen/heads/neurons.json",
        "judged/results.json",
        "items.jsonl",
    )
    for kind in kinds:
        assert any(name.endswith(kind) for name in names), kind
    assert any(name.startswith("compared/") and name.endswith(".parquet") for name in names)
    assert {Path(name).suffix for name in names} >= set(LISTED) - {".md"}
    assert content(one / "chosen" / "random" / "neurons.json") != content(one / "chosen" / "another-seed" / "neurons.json")
    torch.set_printoptions(threshold=10**9, precision=17)
    try:
        assert differing(one, other) == []
    finally:
        torch.set_printoptions(profile="default")
