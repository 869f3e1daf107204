"""LinearProbe: logistic regression on pooled features.

Legend: N examples, D features of all layers side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryCalibrationError
from typing_extensions import override

from bad_neurons.artifacts import PathLike, read_json, read_tensors, write_json, write_tensors
from bad_neurons.checkpoints import seal_checkpoints
from bad_neurons.errors import UserError
from bad_neurons.formats import PROBE, PROBE_METRICS
from bad_neurons.probe.data import ProbeBatch, ProbeDataModule
from bad_neurons.sealed import digest_tensors


class LinearProbe(L.LightningModule):
    """Logistic regression with an L2 penalty (arXiv 2601.18939, the probe on concatenated SAE features).

    All features are divided by one number, their root mean square over the training side, so that ``l2`` means the same for
    every model; the saved weights are those of the raw features. One number and not one a layer: weights of quiet layers
    would grow by the inverse of their loudness and crowd all others out of the choice of neurons.

    Args:
        out: folder for ``probe.safetensors`` and ``metrics.json``.
        l2: penalty on the squared norm of the weights, per example.
        max_iter: iterations of L-BFGS; the problem is convex, so one full batch is one epoch.
    """

    def __init__(self, out: str = "runs/probe", l2: float = 1e-3, max_iter: int = 300) -> None:
        super().__init__()
        if l2 < 0:
            raise UserError(f"--model.l2 {l2}: at least 0")
        self.out, self.l2, self.max_iter = Path(out), l2, max_iter
        self.metrics = nn.ModuleDict({side: _metrics() for side in ("fit", "validation", "test")})
        self.results: dict[str, dict[str, float]] = {}

    @override
    def setup(self, stage: str) -> None:
        seal_checkpoints(self.trainer)
        if hasattr(self, "weight"):
            return
        data: ProbeDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.origin = data.origin()
        x = next(iter(data.train_dataloader())).x
        self.register_buffer("scale", x.square().mean().sqrt().clamp_min(1e-8))
        self.weight = nn.Parameter(torch.zeros(x.shape[1]))
        self.bias = nn.Parameter(torch.zeros(()))
        if stage != "fit":
            self._load(read_probe(self.out / "probe.safetensors"))

    def _load(self, probe: Probe) -> None:
        for name in ("layers", "widths", "features", "pool", "tokens"):
            if probe.origin[name] != self.origin[name]:
                raise UserError(f"probe {self.out}: trained on {name} {probe.origin[name]}, but the data has {self.origin[name]}")
        if probe.origin["model"]["digest"] != self.origin["model"]["digest"]:
            raise UserError(f"probe {self.out}: trained on {probe.origin['model']['id']}, but the data is of another model")
        if probe.origin["sae_digests"] != self.origin["sae_digests"]:
            raise UserError(f"probe {self.out}: trained on other SAEs than {self.origin['sae']} has now; run `bad-neurons probe fit` again")
        with torch.no_grad():
            self.weight.copy_(torch.cat([probe.weights[layer] for layer in probe.origin["layers"]]) * self.get_buffer("scale"))
            self.bias.fill_(probe.bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Log-odds [N] that the answers are sycophantic, of raw features [N, D]."""
        return (x / self.get_buffer("scale")) @ self.weight + self.bias

    @override
    def training_step(self, batch: ProbeBatch, batch_idx: int) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(self(batch.x), batch.y) + 0.5 * self.l2 * self.weight.square().sum()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        data: ProbeDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        with torch.no_grad():
            self._evaluate("fit", next(iter(data.train_dataloader())))
            self._evaluate("test", next(iter(data.test_dataloader())))

    @override
    def validation_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        self._evaluate("validation", batch)

    @override
    def test_step(self, batch: ProbeBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, side: str, batch: ProbeBatch) -> None:
        metrics = self.metrics[side].to(batch.x.device)
        values = metrics(self(batch.x).sigmoid(), batch.y.int())  # type: ignore[operator]
        metrics.reset()  # type: ignore[operator]
        self.results[side] = {name: float(value) for name, value in values.items()}
        self.results[side]["majority"] = float(torch.maximum(batch.y.mean(), 1 - batch.y.mean()))
        self.results[side]["examples"] = len(batch.y)
        self.log_dict({f"{side}/{name}": value for name, value in self.results[side].items()}, batch_size=1, sync_dist=True)

    @override
    def on_validation_end(self) -> None:
        if self.trainer.state.fn is TrainerFn.VALIDATING:  # a fit writes at its end
            self._write_metrics()

    @override
    def on_test_end(self) -> None:
        self._write_metrics()

    @override
    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            write_probe(self.out / "probe.safetensors", self.raw_weights(), float(self.bias.detach()), self.origin)
            self._write_metrics()

    def _write_metrics(self) -> None:
        if self.trainer.is_global_zero:
            path = self.out / "metrics.json"
            fitting = self.trainer.state.fn is TrainerFn.FITTING  # then what lies there is of another fit, maybe of an older version
            of_the_fit = read_json(path, PROBE_METRICS) if not fitting and path.is_file() else {}
            write_json(path, {"format": PROBE_METRICS, **self.origin, "l2": self.l2, **of_the_fit, **self.results})

    def raw_weights(self) -> dict[int, Tensor]:
        """Weights of the raw features by layer, [F] or [d]."""
        raw = (self.weight.detach() / self.get_buffer("scale")).split(self.origin["widths"])
        return dict(zip(self.origin["layers"], raw, strict=True))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=self.max_iter, history_size=20, line_search_fn="strong_wolfe")


def _metrics() -> MetricCollection:
    return MetricCollection({"accuracy": BinaryAccuracy(), "auroc": BinaryAUROC(), "calibration_error": BinaryCalibrationError(n_bins=10)})


class Probe(NamedTuple):
    """A trained probe.

    Attributes:
        weights: weights of the raw features by layer.
        bias: the intercept.
        origin: model, features, layers, widths, pooling and SAE that it was trained on.
    """

    weights: dict[int, Tensor]
    bias: float
    origin: dict[str, Any]

    @property
    def digest(self) -> str:
        """Fingerprint of the weights and of what they were trained on, wherever that lies."""
        places = {"sae": None, "model": self.origin["model"]["digest"]}
        tensors = {str(layer): w for layer, w in self.weights.items()}
        return digest_tensors(tensors, {**self.origin, **places, "bias": self.bias})


def write_probe(path: PathLike, weights: Mapping[int, Tensor], bias: float, origin: Mapping[str, Any]) -> None:
    """Write ``probe.safetensors``: ``w.<layer>`` and ``bias``, with the origin in the metadata."""
    tensors = {f"w.{layer}": w for layer, w in weights.items()} | {"bias": torch.tensor(bias)}
    write_tensors(path, tensors, {"format": PROBE, "origin": dict(origin)})


def read_probe(path: PathLike) -> Probe:
    """Read ``probe.safetensors``.

    Raises:
        UserError: not such a file, another format or version of it, or damaged.
    """
    tensors, metadata = read_tensors(path, PROBE)
    return Probe({int(name[2:]): w for name, w in tensors.items() if name.startswith("w.")}, float(tensors["bias"]), metadata["origin"])
