"""What whole files cost: the share of a tuning run that goes into syncing and renaming.

    python tests/faults/cost.py --run runs/quickstart          # repeats the tuning stage of a finished run in a folder of its own

The time in `fsync` and `rename` is taken by the clock, that of the run as processor time: on a machine that does other work
beside it, that share is too high, not too low.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bad_neurons.cli import main as command_line


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The function; each call adds its seconds to ``spent``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    return call


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    config = (parser.parse_args().run / "tuning" / "config.yaml").read_text()
    tuned = Path(yaml.safe_load(config)["delta"]["path"]).parent
    with tempfile.TemporaryDirectory(dir=tuned.parent) as place:
        text = config.replace(str(tuned), place)
        (Path(place) / "config.yaml").write_text(text)
        spent: list[float] = []
        os.fsync, os.replace = timed(os.fsync, spent), timed(os.replace, spent)
        start = time.process_time()
        status = command_line(["tune", "fit", "--config", str(Path(place) / "config.yaml")])
        seconds = time.process_time() - start
    sys.stdout.write(f"{len(spent)} calls, {sum(spent):.3f} s of {seconds:.1f} s: {100 * sum(spent) / seconds:.2f} %\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
