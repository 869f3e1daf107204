"""From a source's name to its records.

A source is ``scheme``, ``scheme:part`` or either with ``@`` and a folder or file behind it. Public data is looked for at
that place, or below the folder in the environment variable ``BAD_NEURONS_DATA``, or on the Hugging Face hub.

===============================  ==================================================================================
``embedded``                     the project's own set, always there
``embedded:are-you-sure``        giving in to doubt (:mod:`bad_neurons.data.embedded.are_you_sure`)
``embedded:false-premise``       going along with a false premise (:mod:`bad_neurons.data.embedded.false_premise`)
``some/file.jsonl``              records in the project's own schema (:mod:`bad_neurons.data.records`)
``anthropic:nlp|poli|phil``      model-written evaluations of sycophancy (:mod:`.anthropic`)
``truthfulqa``                   TruthfulQA with a right and a wrong person (:mod:`.truthfulqa`)
``syco-bench:pickside|mirror``   Syco-Bench as a forced choice (:mod:`.syco_bench`)
``open-ended``                   long answers, a sycophantic and an honest one (:mod:`.open_ended`)
===============================  ==================================================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from bad_neurons.data.embedded import embedded_records
from bad_neurons.data.embedded.are_you_sure import are_you_sure_records
from bad_neurons.data.embedded.false_premise import false_premise_records
from bad_neurons.data.readers import anthropic, open_ended, syco_bench, truthfulqa
from bad_neurons.data.records import Record, read_records
from bad_neurons.errors import UserError

# Written here and made from what was written here, by behaviour; no name is sycophancy.
EMBEDDED: dict[str, Callable[[], tuple[Record, ...]]] = {
    "": embedded_records,
    "are-you-sure": are_you_sure_records,
    "false-premise": false_premise_records,
}


def _read_embedded(rest: str) -> list[Record]:
    if rest not in EMBEDDED:
        known = ", ".join(f"embedded:{name}" if name else "embedded" for name in EMBEDDED)
        raise UserError(f"data: no source 'embedded:{rest}'; there are {known}")
    return list(EMBEDDED[rest]())


# What stands behind the scheme (without the colon) goes to the function.
READERS: dict[str, Callable[[str], list[Record]]] = {
    "embedded": _read_embedded,
    "anthropic": anthropic.read,
    "truthfulqa": truthfulqa.read,
    "syco-bench": syco_bench.read,
    "open-ended": open_ended.read,
}
LOCATORS: dict[str, Callable[[str], Path | None]] = {
    "anthropic": anthropic.locate,
    "truthfulqa": truthfulqa.locate,
    "syco-bench": syco_bench.locate,
    "open-ended": open_ended.locate,
}


# What an evaluation measures where its files are on this machine.
PUBLIC = ["anthropic:nlp", "anthropic:poli", "anthropic:phil", "truthfulqa", "open-ended"]


def load_records(source: str) -> list[Record]:
    """Records of a source, each id once.

    Raises:
        UserError: an unknown source, data that cannot be had, malformed data, or two different records with one id.
    """
    scheme, rest = parse_source(source)
    return _unique(source, READERS[scheme](rest) if scheme else read_records(rest))


def available(source: str) -> bool:
    """Whether the source can be read without a network. Only looks whether its file is there.

    Raises:
        UserError: an unknown source.
    """
    return parse_source(source)[0] == "embedded" or local_path(source) is not None


def local_path(source: str) -> Path | None:
    """The file on this machine that the source is read from; None for an embedded set, or when it is not here.

    Raises:
        UserError: an unknown source.
    """
    scheme, rest = parse_source(source)
    if scheme:
        return LOCATORS[scheme](rest) if scheme in LOCATORS else None
    return Path(rest) if os.path.isfile(rest) else None


def files_of(sources: Iterable[str]) -> tuple[Path, ...]:
    """The files on this machine that sources are read from.

    Raises:
        UserError: an unknown source.
    """
    return tuple(path for source in sources if (path := local_path(source)))


def parse_source(source: str) -> tuple[str, str]:
    """Scheme and rest; an empty scheme means that the rest is a path.

    Raises:
        UserError: an unknown source.
    """
    scheme, rest = re.fullmatch(r"([^:@]*):?(.*)", source, re.DOTALL).groups()  # type: ignore[union-attr]
    if scheme in READERS:
        return scheme, rest
    if source.endswith(".jsonl"):
        return "", os.path.expanduser(source)
    raise UserError(f"data: no source {source!r}; known are {', '.join(READERS)}, and paths that end in .jsonl")


def _unique(source: str, records: Iterable[Record]) -> list[Record]:
    seen: dict[str, Record] = {}
    for record in records:
        if seen.setdefault(record.id, record) != record:
            raise UserError(f"{source}: two different records have the id {record.id!r}; expected another `id` for each, or none")
    return list(seen.values())
