"""Activations for SAE training: what the MLP blocks add to the residual stream, harvested once and kept on disk.

Legend: n tokens, d hidden size, T positions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from bad_neurons.artifacts import digest_json
from bad_neurons.batching import Rows, batches_by_length, pack_sequences
from bad_neurons.data.loader import EpochOrder, ResumableLoader
from bad_neurons.data.splits import load_split
from bad_neurons.data.text import load_paragraphs
from bad_neurons.errors import UserError
from bad_neurons.models.load import Dtype, LanguageModel, load_model
from bad_neurons.models.passes import visit_mlp_outputs
from bad_neurons.models.prompts import tokenize, tokenize_text
from bad_neurons.models.view import DecoderView, view_decoder
from bad_neurons.numbers import check_finite
from bad_neurons.ranks import ALONE, Rank, rank_of
from bad_neurons.shards import fill_shards

_SHARD_TOKENS = 8192
_BATCH_TOKENS = 2048


class ActivationBatches(Dataset[dict[int, Tensor]]):
    """Shuffled batches of activations: each item maps a layer to [batch, d], float32.

    Every token is in one batch; the batches are of equal size but for one token, at least ``batch_size`` where there are so many.
    Several processes share each batch: an item is then one process's part of it.
    """

    def __init__(self, activations: dict[int, Tensor], batch_size: int, seed: int, rank: Rank = ALONE) -> None:
        self._activations, self._rank = activations, rank
        n = len(next(iter(activations.values())))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        self._rows = order.tensor_split(max(1, n // batch_size))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[int, Tensor]:
        rows = self._rank.share(self._rows[index])
        return {layer: values[rows].float() for layer, values in self._activations.items()}


class ActivationDataModule(L.LightningDataModule):
    """Activations of several layers at once, from the training records and from running text.

    BOS (the first token where there is none) and padding never enter. Shards are kept below ``folder``; an interrupted harvest
    goes on at the next shard.

    Args:
        model: ``packaged:<name>``, a folder, or a hub id.
        layers: layers to harvest.
        folder: where the shards are kept.
        records: source of records whose prompts and answers are read, or None.
        text: sources of running text (``python-docs``, files, folders, ``hub:<dataset>``).
        max_tokens: tokens in all; records come first, then text.
        validation: share of the tokens kept for validation.
        batch_size: tokens of one training batch, which several processes share.
        validation_topics: share of the topics that are validation topics of the records.
        test_topics: share of the topics that are never read.
        split_seed: seed of the division of topics.
        seed: seed of text order and batches.
        dtype: dtype of the model; activations are kept in bfloat16.
    """

    def __init__(
        self,
        model: str,
        layers: list[int],
        folder: str = "runs/sae/activations",
        records: str | None = "embedded",
        text: list[str] = ["python-docs"],  # noqa: B006 (read only; jsonargparse shows it in --help)
        max_tokens: int = 60_000,
        validation: float = 0.05,
        batch_size: int = 1024,
        validation_topics: float = 0.2,
        test_topics: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
        dtype: Dtype = "auto",
    ) -> None:
        super().__init__()
        if not 0 < validation < 1:
            raise UserError(f"--data.validation {validation}: a share between 0 and 1, such as 0.05")
        if max_tokens < 10 * batch_size:
            raise UserError(f"--data.max_tokens {max_tokens}: at least ten batches of {batch_size} tokens")
        self.model, self.layers, self.folder, self.dtype = model, layers, Path(folder), dtype
        self.records, self.text, self.max_tokens = records, text, max_tokens
        self.validation, self.batch_size, self.seed = validation, batch_size, seed
        self.topics = (validation_topics, test_topics, split_seed)
        self._train: dict[int, Tensor] = {}
        self._held_out: dict[int, Tensor] = {}
        self._read: ResumableLoader[dict[int, Tensor]] | None = None
        self._position: dict[str, int] = {}  # of a checkpoint
        self.origin: dict[str, str] = {}

    def harvest(self, rank: Rank = ALONE) -> None:
        """Read the model and write the shards that are missing; every rank writes its share."""
        lm = load_model(self.model, self.dtype, rank.device)
        view = view_decoder(lm.model)
        view.check_layers(self.layers, "--data.layers")
        sequences = self._sequences(lm)
        key = digest_json([lm.digest, str(lm.model.dtype), sorted(self.layers), sequences])
        self.origin = {"model": lm.digest, "activations": key}
        harvest(view, sequences, sorted(self.layers), self.folder, key, rank)

    def _sequences(self, lm: LanguageModel) -> list[list[int]]:
        """Token ids of what is read, until ``max_tokens``."""
        sequences = []
        if self.records:
            # One answer a record, in turn: the same prompt twice would put copies of training tokens into the validation part.
            for number, record in enumerate(load_split(self.records, *self.topics).train):
                ids = tokenize(lm.tokenizer, record.prompt, record.disagreeing if number % 2 else record.agreeing)
                sequences.append(ids.prompt + ids.answer)
        random.Random(self.seed).shuffle(sequences)
        running = [tokenize_text(lm.tokenizer, p) for source in self.text for p in load_paragraphs(source, "sae", self.seed)]
        # Half from each where there is enough: SAEs of nothing but short questions know little else.
        share = 0.5 if running else 1.0
        kept = _until(sequences, int(share * self.max_tokens))
        return kept + _until(running, self.max_tokens - sum(len(s) - 1 for s in kept))

    @override
    def setup(self, stage: str) -> None:
        if self._train:
            return
        self.harvest(rank_of(self.trainer))
        shards = [load_file(path) for path in sorted(self.folder.glob("shard-*.safetensors"))]
        for layer in sorted(self.layers):
            values = torch.cat([shard[f"layer.{layer}"] for shard in shards])
            held_out = max(1, round(self.validation * len(values)))
            order = torch.randperm(len(values), generator=torch.Generator().manual_seed(self.seed))
            self._train[layer], self._held_out[layer] = values[order[held_out:]], values[order[:held_out]]

    def training_activations(self) -> dict[int, Tensor]:
        """All training activations by layer, [n, d], bfloat16."""
        return self._train

    @override
    def train_dataloader(self) -> DataLoader[dict[int, Tensor]]:
        self._read = self._loader(self._train, self.seed)
        if self._position:
            self._read.load_state_dict(self._position)
        return self._read

    @override
    def val_dataloader(self) -> DataLoader[dict[int, Tensor]]:
        return self._loader(self._held_out)

    def _loader(self, activations: dict[int, Tensor], order: int | None = None) -> ResumableLoader[dict[int, Tensor]]:
        rank = rank_of(self.trainer)
        if self.batch_size < rank.world:
            raise UserError(f"--data.batch_size {self.batch_size}: at least one token for each of {rank.world} processes")
        batches = ActivationBatches(activations, self.batch_size, self.seed, rank)
        return ResumableLoader(batches, EpochOrder(batches, order))  # type: ignore[arg-type]

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._read.state_dict() if self._read else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict

    @override
    def test_dataloader(self) -> DataLoader[dict[int, Tensor]]:
        return self.val_dataloader()


def harvest(
    view: DecoderView, sequences: Sequence[Sequence[int]], layers: Sequence[int], folder: Path, key: str, rank: Rank = ALONE
) -> None:
    """Write the activations of ``sequences`` to shards of ``layer.<number>`` [n, d], bfloat16, BOS left out.

    ``key`` identifies model, layers and text: shards of another key are replaced, those of the same key are kept, so an
    interrupted harvest goes on behind its last shard.
    """
    batches = batches_by_length([len(s) for s in sequences], _BATCH_TOKENS)
    per_shard = _SHARD_TOKENS // _BATCH_TOKENS
    shards = [batches[i : i + per_shard] for i in range(0, len(batches), per_shard)]

    def compute(number: int) -> dict[str, Tensor]:
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for batch in shards[number]:
            rows = pack_sequences([sequences[i] for i in batch]).to(view.device)
            keep = rows.attention_mask.bool() & (rows.positions > 0)  # the first token, BOS or not, is an outlier of its own
            _collect(view, rows, keep, parts)
        return {f"layer.{layer}": torch.cat(p) for layer, p in parts.items()}

    fill_shards(folder, "shard", len(shards), key, compute, f"harvesting {len(layers)} layers", rank)


def _collect(view: DecoderView, rows: Rows, keep: Tensor, parts: dict[int, list[Tensor]]) -> None:
    """Add the activations of each layer at ``keep`` [B, T] to ``parts``."""

    def visit(layer: int, values: Tensor) -> None:
        check_finite(kept := values[keep], f"activations of layer {layer}")
        parts[layer].append(kept.to("cpu", torch.bfloat16))

    visit_mlp_outputs(view, rows, list(parts), visit)


def _until(sequences: list[list[int]], limit: int) -> list[list[int]]:
    """Sequences from the start until their tokens, without the first of each, reach ``limit``."""
    kept, total = [], 0
    for sequence in sequences:
        if total >= limit:
            break
        kept.append(sequence)
        total += len(sequence) - 1
    return kept
