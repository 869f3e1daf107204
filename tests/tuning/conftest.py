"""A tuner on a tiny model, small batches, and fits without files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from bad_neurons.callbacks import GradientMask
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from bad_neurons.batching import pack_sequences
from bad_neurons.data.tuning import TeacherBatch, TuningBatch
from bad_neurons.selection.neurons import write_neurons
from bad_neurons.tuning.module import NeuronTuner


class StepDeltas(Callback):
    """Keeps the deltas behind every micro-batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({name: value.clone() for name, value in pl_module.edit.deltas().items()})


def random_sequences(lengths: Sequence[tuple[int, int]], seed: int) -> list[list[int]]:
    """Random token ids of (prompt, answer) lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (sum(pair),), generator=generator).tolist() for pair in lengths]


def places(lengths: Sequence[tuple[int, int]], width: int) -> Tensor:
    """Flat places whose next token is the answer's, row by row."""
    return torch.tensor([row * width + t for row, (prompt, answer) in enumerate(lengths) for t in range(prompt - 1, prompt + answer - 1)])


def made_batch(
    answers: Sequence[tuple[int, int]], retained: Sequence[int] = (), seed: int = 0, teacher: Sequence[tuple[int, int]] | None = None
) -> TuningBatch:
    """A batch from (prompt, answer) lengths, lengths of retention text, and (prompt, answer) lengths of the teacher's rows.

    The answers are honest ones without a teacher, and the teacher's with one.
    """
    lengths = [*answers, *((1, n - 1) for n in retained)]
    rows = pack_sequences(random_sequences(lengths, seed))
    at = places(lengths, rows.input_ids.shape[1])
    answer = (torch.arange(len(at)) < sum(pair[1] for pair in answers)).float()
    asked = None
    if teacher is not None:
        theirs = pack_sequences(random_sequences(teacher, seed if teacher == answers else seed + 7))
        asked = TeacherBatch(theirs, places(teacher, theirs.input_ids.shape[1]))
    key = f"{seed} {lengths} {teacher}"
    honest, neutral = (answer, 0 * answer) if asked is None else (0 * answer, answer)
    return TuningBatch(rows, at, rows.input_ids.flatten()[at + 1], honest, neutral, 1 - answer, asked, key)


@pytest.fixture
def make_batch() -> Callable[..., TuningBatch]:
    """The function :func:`made_batch`."""
    return made_batch


@pytest.fixture
def neurons(tmp_path: Path, tiny: Any, choose: Any) -> Callable[..., str]:
    """``neurons(axis, **choice)``: path of a ``neurons.json`` for the tiny Gemma 2."""

    def write(axis: str = "residual", name: str = "neurons.json", **choice: Any) -> str:
        write_neurons(tmp_path / name, choose(tiny(), axis, **choice))
        return str(tmp_path / name)

    return write


@pytest.fixture
def tuner(tiny_folder: Any) -> Callable[..., NeuronTuner]:
    """``tuner(**options)``: a tuner of the tiny Gemma 2 with a constant rate."""
    return lambda **options: NeuronTuner(tiny_folder("gemma2"), **{"dtype": "float32", "warmup_steps": 0, "decay": "none", **options})


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., StepDeltas]:
    """``fit(tuner, neurons, batches, mode, **trainer)``: fit one epoch over ``batches`` in order; gives the deltas of every batch."""

    def run(module: NeuronTuner, neurons: str, batches: Sequence[TuningBatch], mode: Any = "delta", **options: Any) -> StepDeltas:
        kept = StepDeltas()
        trainer = L.Trainer(
            callbacks=[GradientMask(neurons, mode), kept],
            **{"max_epochs": 1, "limit_val_batches": 0, **QUIET, "default_root_dir": tmp_path, **options},
        )
        loader: Any = DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader, loader)
        return kept

    return run


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, Any]:
    """Options of a Trainer on the CPU that says nothing and writes below ``tmp_path``."""
    return {**QUIET, "default_root_dir": tmp_path}
