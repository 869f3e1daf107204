"""The record: one question asked by one person, and the answers to it.

A record is one line of JSON. ``sycophantic`` / ``honest`` are the two answers when the person is wrong or the matter is
one of opinion. When the person is right, agreeing *is* honest, and the other answer is ``contrarian``: it contradicts
somebody who is right. So ``honest`` is always what a good model says, and :attr:`Record.agreeing` always what pleases.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bad_neurons.artifacts import PathLike, digest_json
from bad_neurons.errors import UserError
from bad_neurons.models.prompts import Turn
from bad_neurons.reading import parse_json, read_text

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """One question from one person with its candidate answers.

    Attributes:
        prompt: turns (``role``, ``content``) that carry the person's view; a last assistant turn begins the answer.
        honest: the answer of a model without the behaviour.
        sycophantic: the answer that agrees with a person who is wrong, or with an opinion; None when the person is right.
        contrarian: the answer that contradicts a person who is right; None otherwise.
        topic: what it is about; splits never divide a topic.
        source: where the record comes from.
        neutral_prompt: the same turns without the person's view, or None.
        person_is_right: True, False, or None for a matter of opinion.
        choices: the two positions in plain words for scoring, ``(agreeing, disagreeing)``; None means the answers
            themselves.
        id: unique name; made from the content when none is given.
    """

    prompt: tuple[Turn, ...]
    honest: str
    topic: str
    source: str
    sycophantic: str | None = None
    contrarian: str | None = None
    neutral_prompt: tuple[Turn, ...] | None = None
    person_is_right: bool | None = None
    choices: tuple[str, str] | None = None
    id: str = ""

    def __post_init__(self) -> None:
        right = self.person_is_right is True
        if (self.contrarian if right else self.sycophantic) is None or (self.sycophantic if right else self.contrarian) is not None:
            need, other = ("contrarian", "sycophantic") if right else ("sycophantic", "contrarian")
            raise ValueError(f"person_is_right is {self.person_is_right}, so it needs `{need}` and no `{other}`")
        if self.agreeing == self.disagreeing:
            raise ValueError("the two answers are the same")
        if not self.id:
            content = [self.prompt, self.agreeing, self.disagreeing, self.topic, self.source]
            object.__setattr__(self, "id", digest_json(content)[:16])

    @property
    def agreeing(self) -> str:
        """The answer that agrees with the person."""
        return self.honest if self.person_is_right else self.sycophantic  # type: ignore[return-value]

    @property
    def disagreeing(self) -> str:
        """The answer that does not agree with the person."""
        return self.contrarian if self.person_is_right else self.honest  # type: ignore[return-value]

    @property
    def scored(self) -> tuple[str, str]:
        """The two texts whose probabilities are compared: ``(agreeing, disagreeing)``."""
        return self.choices or (self.agreeing, self.disagreeing)


def record_from_json(row: Any) -> Record:
    """A record from one parsed JSON line.

    Raises:
        ValueError: a field is missing or of the wrong kind; the message names it.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    unknown = set(row) - set(Record.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}; known are {', '.join(Record.__dataclass_fields__)}")
    texts = {
        name: _text(row, name, required=name in ("honest", "topic"))
        for name in ("honest", "topic", "sycophantic", "contrarian", "source", "id")
    }
    right = row.get("person_is_right")
    if right is not None and not isinstance(right, bool):
        raise ValueError(f"`person_is_right` is {right!r}; expected true, false or null")
    return Record(
        prompt=_turns(row, "prompt", required=True) or (),
        neutral_prompt=_turns(row, "neutral_prompt", required=False),
        person_is_right=right,
        choices=_choices(row),
        **{**texts, "source": texts["source"] or "own", "id": texts["id"] or ""},  # type: ignore[arg-type]
    )


def record_to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record, without absent fields."""
    return {key: value for key, value in asdict(record).items() if value is not None}


def read_jsonl_rows(path: PathLike) -> list[tuple[int, Any]]:
    """Line number (from 1) and parsed value of every non-empty line.

    Raises:
        UserError: the file cannot be read, or a line is not JSON; the message names the line.
    """
    lines = read_text(path, "a JSONL file").split("\n")  # splitlines would also cut at U+2028 inside a text
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((number, parse_json(line)))
            except ValueError as error:
                raise UserError(f"{path}: line {number}: not JSON ({getattr(error, 'msg', error)}); expected one object a line") from error
    if not rows:
        raise UserError(f"{path}: empty; expected one JSON object a line")
    return rows


def read_records(path: PathLike) -> list[Record]:
    """Records of a JSONL file in the project's own schema.

    Raises:
        UserError: unreadable file or a line that is no record; the message names the line and the field.
    """
    records = []
    for number, row in read_jsonl_rows(path):
        try:
            records.append(record_from_json(row))
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}") from error
    return records


def unique_by_id(records: Iterable[Record]) -> list[Record]:
    """The records without repetitions, in order."""
    return list({record.id: record for record in records}.values())


def _text(row: dict[str, Any], name: str, *, required: bool) -> str | None:
    value = row.get(name)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` is {'missing' if value is None else repr(value)[:40]}; expected a non-empty text")
    return value


def _turns(row: dict[str, Any], name: str, *, required: bool) -> tuple[Turn, ...] | None:
    value = row.get(name)
    if value is None and not required:
        return None
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    ok = isinstance(value, list) and bool(value)
    for turn in value if ok else []:  # type: ignore[union-attr]
        ok = ok and isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)
    if not ok:
        raise ValueError(
            f"`{name}` is {'missing' if value is None else 'malformed'}; expected a text or a list of turns with `role` "
            f"({', '.join(_ROLES)}) and `content`"
        )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)  # type: ignore[union-attr]


def _choices(row: dict[str, Any]) -> tuple[str, str] | None:
    value = row.get("choices")
    if value is None:
        return None
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, str) and v.strip() for v in value)):
        raise ValueError("`choices` is malformed; expected two texts: the agreeing position, then the other")
    return (value[0], value[1])
