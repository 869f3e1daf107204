"""What a comparison is made of: what all its cells share, and what each of them does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bad_neurons import __version__
from bad_neurons.artifacts import digest_json, digest_path
from bad_neurons.data.readers import local_path
from bad_neurons.data.splits import sources_of
from bad_neurons.models.load import Dtype, model_stamp

Options = dict[str, Any]

OWN = ("strengths", "seeds", "examples")  # of the comparison's lists, those that a method may have for itself


@dataclass(frozen=True)
class Setting:
    """What all cells of a comparison share.

    Attributes:
        model: ``packaged:<name>``, a folder, or a hub id.
        layers: layers that are corrected.
        records: source of the training records, or several with commas between them.
        suites: sources that are measured; of those that are trained on, the topics of one side of the split alone.
        validation: share of the topics for validation.
        test: share of the topics for the final measurement.
        split_seed: seed of the division of topics.
        side: side of the split that is measured: ``test``, or ``validation`` for choosing options.
        max_items: at most so many items of a suite, drawn evenly over topics; 0 means all.
        text: source of the unrelated text for KL and perplexity, and of the text that ways to choose neurons weigh.
        max_paragraphs: paragraphs of it that are measured.
        dtype: dtype of the model.
        probe: ``probe.safetensors`` for the ways that read one.
        residual_probe: the same of the probe on activations themselves, for methods that name it (``probe: residual``).
        sae: folder of SAEs, or ``release:id``, for the ways that read one.
    """

    model: str
    layers: tuple[int, ...]
    records: str
    suites: tuple[str, ...]
    validation: float = 0.2
    test: float = 0.2
    split_seed: int = 0
    side: Literal["validation", "test"] = "test"
    max_items: int = 0
    text: str = "python-docs"
    max_paragraphs: int = 40
    dtype: Dtype = "auto"
    probe: str | None = None
    residual_probe: str | None = None
    sae: str | None = None

    @property
    def stamp(self) -> str:
        """Digest of everything that the cells read, the content of local files included."""
        sources = {*sources_of(self.records), *self.suites}
        files = [[source, digest_path(path)] for source in sorted(sources) if (path := local_path(source))]
        read = [digest_path(Path(path)) for path in (self.probe, self.residual_probe, self.sae) if path]
        return digest_json([__version__, asdict(self), model_stamp(self.model), files, read])


class Cell(NamedTuple):
    """One correction, trained once and measured at several strengths.

    Attributes:
        method: its name in the tables.
        options: sections ``correction``, ``select`` and ``tune``.
        seed: seed of choice, order and draw of examples.
        examples: training records at most; 0 means all.
        strengths: the change counts so many times; 0 is the clean model.
    """

    method: str
    options: Options
    seed: int
    examples: int
    strengths: tuple[float, ...]

    def path(self, folder: Path, stamp: str) -> Path:
        """Where its result is kept: the name holds a digest of all that it depends on."""
        key = digest_json([stamp, self.options, self.seed, self.examples, self.strengths])[:16]
        return folder / f"{re.sub('[^a-z0-9]+', '-', self.method.lower())}-n{self.examples}-seed{self.seed}-{key}.json"


def cells_of(methods: Mapping[str, Options], seeds: Sequence[int], examples: Sequence[int], strengths: Sequence[float]) -> Iterator[Cell]:
    """Every method with every seed and number of examples; what a method itself names of :data:`OWN` wins."""
    every = {count: None for method in methods.values() for count in (*examples, *method.get("examples", ()))}
    for count in every:
        for seed in seeds:
            for name, method in methods.items():
                if count in method.get("examples", examples) and seed in method.get("seeds", seeds):
                    options = {key: value for key, value in method.items() if key not in OWN}
                    yield Cell(name, options, seed, count, tuple(method.get("strengths", strengths)))
