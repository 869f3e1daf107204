"""One model on which many corrections are trained and measured, each for itself.

What does not change between cells is computed once: the model is loaded once, the clean model's passes over the training
batches and over the unrelated text are kept, and so are the clean model's scores on the suites.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning as L

from bad_neurons.compare.corrections import build_correction
from bad_neurons.compare.setting import Cell, Options, Setting
from bad_neurons.data.records import Record
from bad_neurons.data.splits import load_split, measured_records
from bad_neurons.data.text import load_paragraphs
from bad_neurons.data.tuning import SycophancyDataModule, draw_evenly
from bad_neurons.errors import UserError
from bad_neurons.evaluation.evaluate import suite_name
from bad_neurons.evaluation.side_effects import CleanStates, side_effects
from bad_neurons.evaluation.suites import Row, score_items
from bad_neurons.models.load import in_float32, load_model
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.clean_cache import CleanCache
from bad_neurons.tuning.edits import Edit
from bad_neurons.tuning.module import NeuronTuner

# A cell is measured at its end, and the whole comparison has one progress bar.
_QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1,
}  # fmt: skip


class Workbench:
    """A loaded model with all that cells share.

    Args:
        setting: what they share.
        cache_gb: memory for the clean model's passes over training batches, in GB (10^9 bytes).
    """

    def __init__(self, setting: Setting, cache_gb: float = 4.0) -> None:
        self.setting, self._cache_bytes = setting, int(cache_gb * 1e9)
        self.lm = load_model(setting.model, setting.dtype)
        self.view = view_decoder(self.lm.model)
        self.view.check_layers(list(setting.layers), "layers")
        self._clean_states = CleanStates()
        self._caches: dict[int, CleanCache] = {}  # by first edited layer
        self._data: dict[str, SycophancyDataModule] = {}

    @cached_property
    def suites(self) -> dict[str, list[Record]]:
        """The items that are measured, by source."""
        setting = self.setting
        split = (setting.validation, setting.test, setting.split_seed)
        found = {source: measured_records(source, setting.records, *split, setting.side) for source in setting.suites}
        return {source: draw_evenly(records, setting.max_items, setting.split_seed) for source, records in found.items()}

    @cached_property
    def clean(self) -> dict[str, list[Row]]:
        """Rows of the clean model, by source."""
        return {source: sides.before for source, sides in score_items(self.view, self.lm.tokenizer, self.suites, letters=False).items()}

    @cached_property
    def texts(self) -> list[str]:
        """Unrelated text that neither training nor choosing sees."""
        return load_paragraphs(self.setting.text, "measure")[: self.setting.max_paragraphs]

    def retention(self, seed: int) -> list[str]:
        """Unrelated text for training and choosing."""
        return load_paragraphs(self.setting.text, "retention", seed)

    def training_records(self, examples: int, seed: int) -> list[Record]:
        """What a cell learns from; the same that its data module draws."""
        setting = self.setting
        return draw_evenly(load_split(setting.records, setting.validation, setting.test, setting.split_seed).train, examples, seed)

    def data(self, options: Options, examples: int, seed: int) -> SycophancyDataModule:
        """The batches of a cell; cells with the same options share them."""
        setting = self.setting
        own = {"records": setting.records, "validation": setting.validation, "test": setting.test, "split_seed": setting.split_seed}
        given = {**own, "retention": setting.text, **options, "max_records": examples, "seed": seed}
        key = repr(sorted(given.items()))
        if key not in self._data:
            self._data[key] = _made("tune.data", SycophancyDataModule, self.setting.model, **given)
            self._data[key].setup("fit")
        return self._data[key]

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train a correction and measure it at each strength.

        Returns:
            ``strengths``: one JSON-ready object each, with ``strength``, the side effects, and ``items`` (rows by suite);
            ``clean``: rows of the clean model by suite; and what is known of the correction.

        Raises:
            UserError: an option is unknown or out of range.
        """
        start = time.monotonic()
        L.seed_everything(cell.seed, verbose=False)
        correction = build_correction(self, cell)
        try:
            if correction.edit.trainable():
                self.fit(correction.edit, cell)
            trained = time.monotonic()
            measured = [self.measure(correction.edit, strength) for strength in cell.strengths]
        finally:
            correction.edit.remove()
        return {
            "method": cell.method, "seed": cell.seed, "examples": cell.examples, "options": cell.options, **correction.facts,
            "train_seconds": trained - start, "measure_seconds": time.monotonic() - trained,
            "clean": _named(self.clean), "strengths": measured,
        }  # fmt: skip

    def fit(self, edit: Edit, cell: Cell) -> None:
        """Train an edit that is on the model, in place."""
        tune = cell.options.get("tune") or {}
        data = self.data(tune.get("data") or {}, cell.examples, cell.seed)
        tuner: NeuronTuner = _made("tune.model", NeuronTuner.of, self.lm, **(tune.get("model") or {}))
        tuner.cache_bytes = self._cache_bytes
        tuner.attach(edit, self._caches.get(edit.first_layer))
        self._caches[edit.first_layer] = tuner.clean_cache
        options = {"max_epochs": 2, "gradient_clip_val": 1.0, **_QUIET, **(tune.get("trainer") or {})}
        for name in ("lightning.pytorch", "lightning.fabric"):  # which devices there are not, and advertisements
            logging.getLogger(name).setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer: L.Trainer = _made("tune.trainer", L.Trainer, **options)
            trainer.fit(tuner, datamodule=data)

    def measure(self, edit: Edit, strength: float) -> dict[str, Any]:
        """Rows of every suite and side effects, with the change counting ``strength`` times."""
        with edit.disabled():
            clean = self.clean
        with edit.scaled(strength):
            sides = score_items(self.view, self.lm.tokenizer, self.suites, edit, letters=False, clean=clean)
            with in_float32(self.lm.model):
                effects = side_effects(self.view, self.lm.tokenizer, self.texts, edit, clean=self._clean_states)
        effects["kl_per_token"] = max(0.0, effects["kl_per_token"])  # of next to no change it is a rounding error on either side of 0
        return {"strength": strength, **effects, "items": _named({source: side.after or [] for source, side in sides.items()})}


def _made(section: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call with options from a configuration's section.

    Raises:
        UserError: an unknown option; the message names the section.
    """
    try:
        return make(*args, **options)
    except TypeError as error:
        raise UserError(f"{section}: {error}") from error


def _named(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    return {suite_name(source): list(items) for source, items in rows.items()}
