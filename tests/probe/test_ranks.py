"""Extraction by two processes is extraction by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bad_neurons.testing import save_tiny_saes
from helpers import write_records


def probe_fit(folder, name, model, records, saes, devices):
    """`bad-neurons probe fit` in processes of its own; gives the folder of its features."""
    command = Path(sys.executable).parent / "bad-neurons"
    options = {
        "--data.model": model, "--data.layers": "[1,3]", "--data.sae": saes, "--data.folder": str(folder / name / "features"),
        "--data.records": records, "--data.dtype": "float32", "--model.out": str(folder / name), "--trainer.accelerator": "cpu",
        "--trainer.devices": str(devices), "--trainer.strategy": "ddp" if devices > 1 else "auto",
    }  # fmt: skip
    words = [str(command), "probe", "fit", *(word for pair in options.items() for word in pair)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / name / "features"


@pytest.mark.ddp
def test_two_processes_extract_what_one_does(tmp_path, tiny_folder):
    records = write_records(tmp_path / "records.jsonl", topics=6, per_topic=40)  # 360 answers: two shards
    saes = save_tiny_saes(tmp_path / "saes", [1, 3])
    one, two = (probe_fit(tmp_path, name, tiny_folder(), records, saes, devices) for name, devices in (("one", 1), ("two", 2)))
    names = [path.name for path in sorted(one.iterdir())]
    assert names == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert [path.name for path in sorted(two.iterdir())] == names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    probes = [load_file(tmp_path / name / "probe.safetensors") for name in ("one", "two")]
    assert all((probes[0][key] - probes[1][key]).abs().max() < 1e-4 for key in probes[0])
