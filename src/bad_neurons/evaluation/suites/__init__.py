"""Suites: what is asked about a source's records, and what the log-probabilities of the answers say.

A kind of suite is one file with a class that has the methods of :class:`Suite`. To add one, write that file, name the
sources that it is for in :data:`SUITES` (every other source is a suite of two choices), and give new measures their titles
in :data:`bad_neurons.report.terminal.MEASURES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from bad_neurons.data.readers import parse_source
from bad_neurons.data.records import Record
from bad_neurons.evaluation.scoring import Request, Score, Sides, answer_log_probs
from bad_neurons.evaluation.suites.open_ended import OpenEnded
from bad_neurons.evaluation.suites.two_choice import TwoChoice
from bad_neurons.models.passes import Switch
from bad_neurons.models.prompts import answer_ids
from bad_neurons.models.view import DecoderView
from bad_neurons.ranks import ALONE, Rank

Row = dict[str, Any]


class Suite(Protocol):
    """A kind of suite: from a record to what is asked, from the answers' log-probabilities to a row, from rows to numbers."""

    def requests(self, record: Record) -> list[Request]:
        """The answers whose log-probabilities are wanted."""

    def row(self, record: Record, scores: Sequence[Score]) -> Row:
        """The JSON-ready row of an item.

        It has ``id``, ``topic`` and ``valid``, which is False where a score is not a finite number.

        Args:
            record: the item.
            scores: one for each of its :meth:`requests`.
        """

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``n``, ``topics``, ``valid``, and the measures, each with its interval over topics."""


SUITES: dict[str, Suite] = {"open-ended": OpenEnded()}  # by the scheme of the source


def suite_of(source: str, letters: bool = True) -> Suite:
    """The suite of a source.

    Args:
        source: name of a source of records, or path of a JSONL file.
        letters: score letters beside the words where the suite has them; they take about half of the time.
    """
    scheme, _ = parse_source(source)
    return SUITES[scheme] if scheme in SUITES else TwoChoice(letters)


def score_items(
    view: DecoderView,
    tokenizer: PreTrainedTokenizerBase,
    records: Mapping[str, Sequence[Record]],
    edit: Switch | None = None,
    letters: bool = True,
    clean: Mapping[str, Sequence[Row]] | None = None,
    rank: Rank = ALONE,
) -> dict[str, Sides]:
    """Rows of each item of some sources without and with an edit; everything is scored together.

    Args:
        view: the model, with ``edit`` on.
        tokenizer: its tokenizer.
        records: the items by source.
        edit: the edit to measure; without one the model is measured as it is, and there is no ``after``.
        letters: score letters beside the words.
        clean: rows of the clean model by source, where an earlier call gave them for the same records. They become ``before``,
            and the model as it is, with its edit on, is all that is measured: about half of the work.
        rank: which of several processes this is; each scores its part, and all get the rows of all.

    Raises:
        ValueError: ``clean`` has other items than ``records``.
    """
    if clean is not None:
        _check_same(clean, records)
    suites = {source: suite_of(source, letters) for source in records}
    asked = [(source, record, suites[source].requests(record)) for source, items in records.items() for record in items]
    requests = [request for *_, mine in asked for request in mine]
    what = f"{len(records)} suites, {len(asked)} items"
    measured = answer_log_probs(view, tokenizer, requests, edit if clean is None else None, what=what, rank=rank)
    tokens = [len(answer_ids(tokenizer, request.turns, request.answer)) for request in requests]

    def rows(log_probs: Sequence[float]) -> dict[str, list[Row]]:
        left, found = iter(map(Score, log_probs, tokens)), {source: list[Row]() for source in records}
        for source, record, mine in asked:
            found[source].append(suites[source].row(record, list(islice(left, len(mine)))))
        return found

    as_it_is = rows(measured.before)
    if clean is not None:
        return {source: Sides(list(clean[source]), as_it_is[source]) for source in records}
    after = rows(measured.after) if measured.after is not None else dict.fromkeys(records)
    return {source: Sides(as_it_is[source], after[source]) for source in records}


def _check_same(clean: Mapping[str, Sequence[Row]], records: Mapping[str, Sequence[Record]]) -> None:
    for source, items in records.items():
        if [row["id"] for row in clean.get(source, ())] != [record.id for record in items]:
            raise ValueError(
                f"clean: the rows of {source} are not those of its {len(items)} records; expected one a record, in their order"
            )
