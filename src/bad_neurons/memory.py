"""Too little memory, answered with what to lower."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from bad_neurons.errors import RunError

# command: its options that decide how much memory it takes, the most useful first
LOWER: dict[str, tuple[str, ...]] = {
    "sae": ("data.max_tokens", "data.layers", "model.d_sae", "data.batch_size", "data.dtype bfloat16"),
    "layers": ("max_records", "candidates", "sae_gb", "dtype bfloat16"),
    "probe": ("data.max_records", "data.layers", "data.sae_gb", "data.dtype bfloat16"),
    "probes": ("max_records", "layers", "sae_gb", "dtype bfloat16"),
    "select": ("max_records", "max_texts", "layers", "dtype bfloat16"),
    "tune": (
        "data.batch_tokens", "data.retention_rows", "model.cache_gb", "model.dtype bfloat16", "model.checkpointing true",
        "guard.enabled false",
    ),
    "evaluate": ("max_paragraphs", "text null", "max_items", "dtype bfloat16"),
    "judge": ("max_questions", "max_new_tokens", "dtype bfloat16"),
    "judge-agreement": ("max_answers",),
    "export": ("dtype bfloat16",),
    "compare": ("processes",),
    "sweep": ("processes",),
}  # fmt: skip
_SAID = re.compile(
    r"out of memory|can.t allocate memory|cannot allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc", re.I
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?)", re.I)


@contextmanager
def enough_memory(command: str, section: str | None = None) -> Iterator[None]:
    """Turn any library's way to say that memory ran out inside the block into one line.

    Args:
        command: which command runs inside it.
        section: section of a run's YAML file that holds its options, where it is a stage of one.

    Raises:
        RunError: memory ran out; it says what to lower.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if (said := out_of_memory(error)) is None:
            raise
        options = ", ".join(option if section else f"--{option}" for option in LOWER.get(command, ()))
        advice = f"lower or set {options}{f' (section `{section}` of the run)' if section else ''}" if options else "end other programs"
        raise RunError(f"{command}: not enough memory ({said}); {advice}") from error


def out_of_memory(error: BaseException | None) -> str | None:
    """What an error, or one behind it, says of memory that ran out; None where none of them does."""
    while error is not None:
        kind, text = type(error).__name__, str(error)
        if isinstance(error, BrokenProcessPool):
            return "the system ended a process, as it does where memory runs out"
        ran_out = isinstance(error, MemoryError) or kind == "OutOfMemoryError" or getattr(error, "errno", None) == errno.ENOMEM
        if ran_out or (isinstance(error, RuntimeError | OSError) and _SAID.search(text)):
            asked, place = _ASKED.search(text), "of the GPU" if "CU" in text else "of the machine"
            return f"{place}{f', {asked[1]} were asked for' if asked else ''}"
        error = error.__cause__ or error.__context__
    return None
