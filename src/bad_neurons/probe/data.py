"""ProbeDataModule: labelled features for the probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from bad_neurons.data.loader import EpochOrder
from bad_neurons.data.splits import load_split
from bad_neurons.data.tuning import draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.models.load import Dtype
from bad_neurons.probe.answers import answer_features
from bad_neurons.probe.features import Features, Pool, Pooling, Tokens
from bad_neurons.ranks import rank_of

SIDES = ("train", "validation", "test")


class ProbeBatch(NamedTuple):
    """All examples of one side of the split.

    Attributes:
        x: features of the layers side by side, [N, D], float32.
        y: labels [N], float32; 1 is sycophantic.
    """

    x: Tensor
    y: Tensor


class ProbeDataModule(L.LightningDataModule):
    """Pooled features of sycophantic and honest answers, extracted once and cached.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        layers: layers whose features are put side by side.
        sae: folder of an SAE stage, or ``release:id`` with ``{layer}``; None is enough for ``residual`` features.
        features: ``sae`` features, or the ``residual`` activations themselves (the control).
        folder: where the features are kept; both kinds are extracted in one pass, so two probes can share it.
        records: source of the records, or several with commas between them.
        pool: how the positions of an answer become one vector.
        tokens: pool over the tokens of the answer, or over all but BOS.
        validation: share of the topics for validation.
        test: share of the topics for the test.
        split_seed: seed of the division of topics.
        max_records: at most so many records, drawn evenly over topics; 0 means all.
        dtype: dtype of the model.
        sae_gb: memory for SAEs, in GB (10^9 bytes); where they do not fit together they are loaded in turns.
    """

    def __init__(
        self,
        model: str,
        layers: list[int],
        sae: str | None = "runs/sae",
        features: Features = "sae",
        folder: str = "runs/probe/features",
        records: str = "embedded",
        pool: Pool = "max",
        tokens: Tokens = "answer",
        validation: float = 0.2,
        test: float = 0.2,
        split_seed: int = 0,
        max_records: int = 0,
        dtype: Dtype = "auto",
        sae_gb: float = 8.0,
    ) -> None:
        super().__init__()
        if sae_gb <= 0:
            raise UserError(f"--data.sae_gb {sae_gb}: above 0, such as 8")
        if features == "sae" and not sae:
            raise UserError("--data.sae: needed for --data.features sae; a folder of an SAE stage, or release:id")
        self.model, self.layers, self.sae, self.features, self.folder = model, sorted(layers), sae, features, Path(folder)
        self.records, self.pool, self.tokens, self.dtype, self.max_records = records, pool, tokens, dtype, max_records
        self.validation, self.test, self.split_seed, self.sae_gb = validation, test, split_seed, sae_gb
        self._sides: dict[str, ProbeBatch] = {}
        self.model_digest = ""
        self.sae_digests: dict[str, str] = {}
        self.widths: list[int] = []

    @override
    def setup(self, stage: str) -> None:
        if self._sides:
            return
        split = load_split(self.records, self.validation, self.test, self.split_seed)
        limited = [draw_evenly(split.train, self.max_records, self.split_seed), split.validation, split.test]
        records = [record for side in limited for record in side]
        pooling = Pooling(self.pool, self.tokens)
        answers = answer_features(
            self.model, records, self.layers, self.sae, [pooling], self.folder, self.dtype, self.sae_gb, rank_of(self.trainer)
        )
        self.model_digest, self.sae_digests, labels = answers.model_digest, answers.sae_digests, answers.labels
        sides = torch.tensor([side for side, records in enumerate(limited) for _ in records])[answers.record]
        blocks = [answers.features.read(pooling, self.features, layer) for layer in self.layers]
        self.widths = [block.shape[1] for block in blocks]
        x = torch.cat(blocks, dim=1)
        for number, side in enumerate(SIDES):
            at = sides == number
            self._sides[side] = ProbeBatch(x[at], labels[at])
            if (kinds := len(labels[at].unique())) < 2:
                raise UserError(
                    f"records {self.records}: the {side} side has {int(at.sum())} examples of {kinds} label(s); "
                    "the probe needs sycophantic and honest answers on each side"
                )

    def origin(self) -> dict[str, Any]:
        """What the probe's file says about its features."""
        return {
            "model": {"id": self.model, "digest": self.model_digest},
            "features": self.features,
            "layers": self.layers,
            "widths": self.widths,
            "pool": self.pool,
            "tokens": self.tokens,
            "sae": self.sae if self.features == "sae" else None,
            "sae_digests": self.sae_digests if self.features == "sae" else {},
        }

    @override
    def train_dataloader(self) -> DataLoader[ProbeBatch]:
        return self._loader("train")

    @override
    def val_dataloader(self) -> DataLoader[ProbeBatch]:
        return self._loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[ProbeBatch]:
        return self._loader("test")

    def _loader(self, side: str) -> DataLoader[ProbeBatch]:
        # One batch, which each of several processes reads: the problem is small and convex, and all find the same optimum.
        return DataLoader([self._sides[side]], batch_size=None, sampler=EpochOrder([side]))  # type: ignore[arg-type]
