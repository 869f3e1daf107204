"""Running text: what SAEs are trained on, what the KL keeps in place, and what side effects are measured on.

The three uses take disjoint parts of the same source, so no side effect is measured on text that tuning has seen.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Literal, get_args

from bad_neurons.errors import UserError
from bad_neurons.reading import read_text

Part = Literal["sae", "retention", "measure"]

_SHARES = {"sae": 0.6, "retention": 0.2, "measure": 0.2}
_LENGTH = (200, 1200)  # characters of a paragraph that is kept whole


def load_paragraphs(source: str, part: Part, seed: int = 0) -> list[str]:
    """Paragraphs of one part of a source, shuffled by ``seed``.

    Args:
        source: ``python-docs`` (the English text that comes with every Python), a text file, a folder of ``.txt`` files,
            or ``hub:<dataset>`` (its ``text`` column, first 5,000 rows of the training split).
        part: which of the three disjoint parts.
        seed: order of the paragraphs; the parts are the same whatever the seed, so stages with other seeds stay disjoint.

    Raises:
        UserError: the source cannot be read or has too little text for three parts.
    """
    paragraphs = sorted({p for text in _texts(source) for p in _paragraphs(text)})
    if len(paragraphs) < 10:
        raise UserError(f"text {source}: only {len(paragraphs)} paragraphs of {_LENGTH[0]} characters or more; at least 10 are needed")
    random.Random(0).shuffle(paragraphs)
    start = 0.0
    for name in get_args(Part):
        end = start + _SHARES[name]
        if name == part:
            chosen = paragraphs[round(start * len(paragraphs)) : round(end * len(paragraphs))]
            random.Random(seed).shuffle(chosen)
            return chosen
        start = end
    raise UserError(f"text part {part!r}: expected one of {', '.join(get_args(Part))}")


def _texts(source: str) -> list[str]:
    if source == "python-docs":
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if source.startswith("hub:"):
        return _hub_texts(source)
    path = Path(source)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    return [read_text(file, "python-docs, a text file, a folder of .txt files or hub:<dataset>") for file in files]


def _hub_texts(source: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.removeprefix("hub:"), split="train", streaming=True).take(5000)
        return [row["text"] for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"text {source}: the hub gave no data set with a `text` column ({type(error).__name__}); a text file works too"
        ) from error


def _paragraphs(text: str) -> list[str]:
    """Paragraphs as one line each; long ones cut at the last space that fits."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if len(line) > _LENGTH[1]:
            line = line[: _LENGTH[1]].rsplit(" ", 1)[0]
        if len(line) >= _LENGTH[0]:
            kept.append(line)
    return kept
