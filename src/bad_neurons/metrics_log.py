"""MetricsLog: the metrics of a fit as one CSV file that an interruption leaves no gap and no double row in."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from bad_neurons.writing import written_aside

_SHOWN_AFTER = 100  # rows, after which the file is written for whoever watches


class MetricsLog(Logger):
    """A Lightning logger that writes ``metrics.csv``, whole each time; a fit that goes on continues it.

    Lightning's own CSVLogger begins a new file then. Here all rows so far are in every checkpoint
    (:class:`bad_neurons.callbacks.ExactResume` puts them there), and the file follows.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.rows, self._written = Path(path), [], 0  # type: tuple[Path, list[dict[str, str]], int]

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the results."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append(row_of(metrics, step))

    @override
    @rank_zero_only
    def save(self) -> None:
        if len(self.rows) >= self._written + _SHOWN_AFTER:
            self._write()

    @override
    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: object) -> None:
        self._write()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.rows:
            self._write()

    def _write(self) -> None:
        with written_aside(self.path) as aside:
            aside.write_text(self.text(), encoding="utf-8")
        self._written = len(self.rows)

    def text(self, *further: Mapping[str, str]) -> str:
        """The file's content, with further rows at its end."""
        rows, text = [*self.rows, *further], io.StringIO()
        table = csv.DictWriter(text, sorted({name for row in rows for name in row}), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        return text.getvalue()

    def restore(self, text: str) -> None:
        """Go on from what :meth:`text` gave."""
        self.rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def row_of(metrics: Mapping[str, float], step: int | None) -> dict[str, str]:
    """A row as it stands in the file."""
    return {name: str(value) for name, value in {**metrics, "step": step}.items()}
