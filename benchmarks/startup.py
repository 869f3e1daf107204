"""Start-up: how long the command line takes to answer when there is nothing to compute.

    python benchmarks/startup.py [--rounds 5] [--config configs/quickstart.yaml --out runs/quickstart]

Each round starts a new process. Measured are ``bad-neurons --help``, and ``bad-neurons run`` on a finished run in which nothing
changed: that of ``--config`` and ``--out``, or a run on a tiny random model that is made first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from harness import write_results

from bad_neurons.testing import save_tiny_model


def tiny_run(folder: Path) -> Path:
    """The configuration of a run of all stages on a tiny Gemma 2 and the embedded records."""
    config = {
        "out": str(folder / "run"),
        "model": save_tiny_model(folder / "model", "gemma2"),
        "layers": [1, 3],
        "sae": {"model": {"d_sae": 32, "k": 4}, "data": {"max_tokens": 2000, "batch_size": 128}, "trainer": {"max_epochs": 1}},
        "tune": {"data": {"max_records": 16}, "trainer": {"max_epochs": 1, "limit_val_batches": 1}},
        "evaluate": {"max_items": 8, "max_paragraphs": 2, "answers": 1, "optional_suites": []},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def seconds(arguments: list[str], rounds: int) -> list[float]:
    """Wall-clock seconds of the command in ``rounds`` new processes."""
    command = [sys.executable, "-c", "import sys; from bad_neurons.cli import main; sys.exit(main())", *arguments]
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(round(time.perf_counter() - start, 3))
    return taken


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes that are started for each command")
    parser.add_argument("--config", help="configuration of a finished run")
    parser.add_argument("--out", help="folder of that run, if it is not the configuration's")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = ["run", "--config", given.config or str(tiny_run(Path(temporary))), *(["--out", given.out] if given.out else [])]
        seconds(run, 1)  # finishes what is not finished
        rows = {name: seconds(arguments, given.rounds) for name, arguments in (("--help", ["--help"]), ("run, nothing changed", run))}
    results = {"rows": {name: {"seconds": statistics.median(taken), "seconds_all": taken} for name, taken in rows.items()}}
    sys.stdout.write(f"{results['rows']}\n{write_results('startup', results)}\n")


if __name__ == "__main__":
    main()
