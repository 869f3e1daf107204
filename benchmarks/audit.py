"""What the checks of a fit cost: FrozenAudit and NumberGuard in the quickstart's tuning, as shares of the fit's time.

    python benchmarks/audit.py [--rounds 3] [--records 320] [--bound]

Each round is one fit with the options of ``configs/quickstart.yaml`` on as many random neurons as the quickstart chooses (2.3 % of six
layers). The time inside the callbacks is taken in the same fit as the rest, so whatever else the machine does hits both.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from bad_neurons.callbacks import FrozenAudit, KLBound, NumberGuard
from harness import write_results
from lightning.pytorch.callbacks import ModelCheckpoint

from bad_neurons.data.tuning import SycophancyDataModule
from bad_neurons.models.load import load_model
from bad_neurons.selection.neurons import NeuronSelection
from bad_neurons.tuning.frozen import frozen_tensors
from bad_neurons.tuning.module import NeuronTuner

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SHARE = 0.023


def timed(callback: L.Callback) -> list[float]:
    """Time every hook of a callback; the seconds of each call are added to the list that is given back."""
    taken: list[float] = []

    def around(hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                taken.append(time.perf_counter() - start)

        return call

    for name in vars(type(callback)):
        if name.startswith("on_"):
            setattr(callback, name, around(getattr(callback, name)))
    return taken


def one_fit(lm: Any, options: dict[str, Any], layers: list[int], records: int, bound: bool, folder: str) -> dict[str, float]:
    """Seconds of a fit, and of each callback in it."""
    tuner = NeuronTuner.of(lm, **options["model"])
    d, draw = tuner.view.d_model, random.Random(0)
    chosen = {layer: sorted(draw.sample(range(d), round(SHARE * d))) for layer in layers}
    tuner.attach_neurons(NeuronSelection("residual", chosen, d, layers, lm.id, lm.digest, {"name": "random"}))
    data = SycophancyDataModule(lm.id, **{**options["data"], "max_records": records})
    callbacks = {"audit": FrozenAudit(), "guard": NumberGuard()} | ({"bound": KLBound(1e9)} if bound else {})
    taken = {name: timed(callback) for name, callback in callbacks.items()}
    trainer = L.Trainer(
        **{**options["trainer"], "gradient_clip_val": 1.0, "logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
        callbacks=[*callbacks.values(), ModelCheckpoint(folder, "last")], enable_progress_bar=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(tuner, datamodule=data)
    fit = time.perf_counter() - start
    frozen = sum(t.numel() * t.element_size() for _, t in frozen_tensors(tuner, tuner.edit))  # type: ignore[arg-type]
    tuner.edit.remove()  # type: ignore[union-attr]
    return {"fit": fit, **{name: sum(seconds) for name, seconds in taken.items()}, "steps": trainer.global_step, "frozen_bytes": frozen}


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="fits")
    parser.add_argument("--records", type=int, default=320, help="training records")
    parser.add_argument("--bound", action="store_true", help="measure the KL every ten steps, too")
    given = parser.parse_args()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    lm = load_model(config["model"])
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = [one_fit(lm, config["tune"], config["layers"], given.records, given.bound, folder) for _ in range(given.rounds)]
    checks = [name for name in ("audit", "guard", "bound") if name in rows[0]]
    shares = {name: statistics.median(row[name] / row["fit"] for row in rows) for name in checks}
    path = write_results("audit", {"rows": rows, "shares": shares})
    sys.stdout.write(f"{rows}\nshares of the fit: {', '.join(f'{name} {share:.2%}' for name, share in shares.items())}\n{path}\n")


if __name__ == "__main__":
    main()
