"""Batches for tuning: prompts with the answers that teach, and retention text for the KL."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typing_extensions import override

from bad_neurons.artifacts import digest_json
from bad_neurons.batching import Rows, Tree, common_prefix, pack, prefix_tree
from bad_neurons.data.loader import EpochOrder, ResumableLoader
from bad_neurons.data.records import Record
from bad_neurons.data.splits import load_split
from bad_neurons.data.text import load_paragraphs
from bad_neurons.errors import UserError
from bad_neurons.models.load import resolve_model
from bad_neurons.models.prompts import Turn, tokenize, tokenize_text
from bad_neurons.ranks import rank_of
from bad_neurons.tuning.shift import Pairs

Target = Literal["honest", "neutral", "mixed", "shift"]
_WEIGHTS: dict[Target, tuple[float, float]] = {"honest": (1.0, 0.0), "neutral": (0.0, 1.0), "shift": (0.0, 0.0)}

_ROW_WIDTH = 256  # short prompts share rows up to here: less padding, and attention still costs little at this width


class TeacherBatch(NamedTuple):
    """What the clean model reads as the teacher.

    Attributes:
        rows: both positions behind the question without the person.
        at: [A], int64; as many flat places as the batch has taught places, in the same order.
    """

    rows: Rows
    at: Tensor


class TuningBatch(NamedTuple):
    """One micro-batch. Each place is a position whose next token is supervised.

    Taught places come first, then what is left of the honest answers, then retention text. Answers to one prompt share it in
    one row, so where they begin alike one place stands for several of them.

    Attributes:
        rows: the rows.
        at: [N], int64; flat places (row * T + column) in the rows.
        targets: [N], int64; ids of the honest answers' next tokens, 0 at places of no honest answer.
        honest: [N], float32; weight of the cross entropy: so many honest tokens as the place stands for, each with its weight.
        neutral: [N], float32; weight of the KL to the teacher, likewise; above 0 at the first A places and nowhere else.
        retained: [N], float32; number of retention tokens that the place stands for, 0 for answers.
        teacher: where the distributions of taught places come from, or None where A is 0.
        key: digest of what the clean model is asked: the rows and the places.
        pairs: both positions of the records that have a teacher, token by token, or None where A is 0.
    """

    rows: Rows
    at: Tensor
    targets: Tensor
    honest: Tensor
    neutral: Tensor
    retained: Tensor
    teacher: TeacherBatch | None = None
    key: str = ""
    pairs: Pairs | None = None

    @property
    def answer(self) -> Tensor:
        """[N], float32; weight of the tokens of answers that each place stands for."""
        return self.honest + self.neutral

    @property
    def tokens(self) -> float:
        """What the sums are divided by: the weight of all answer tokens; their number where none has a weight (target ``shift``)."""
        return float(self.answer.sum()) or float(len(self.pairs.at) if self.pairs else 0)


def no_batch() -> TuningBatch:
    """A batch of nothing, for a process for which none is left."""
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    table = torch.zeros(0, 0, dtype=torch.long)
    return TuningBatch(Rows(table, table, table, table, branched=False), ids, ids, none, none, none)


def _idle(batches: Sequence[TuningBatch], target: Target) -> TuningBatch:
    """A batch that runs the layers that the others run, and counts nothing."""
    first, *others = batches
    if any((first.teacher is None) != (other.teacher is None) for other in others):
        raise UserError(f"--trainer.strategy fsdp2: with --data.target {target} every record needs a neutral prompt")
    return first._replace(honest=0 * first.honest, neutral=0 * first.neutral, retained=0 * first.retained, pairs=None)


class _Group(NamedTuple):
    """Answers to one prompt, or one piece of retention text.

    The answers of the teacher, which reads the neutral prompt, are the last ones here.
    """

    tree: Tree
    firsts: list[int]  # of each sequence, the first position whose next token is supervised
    teacher: _Group | None = None

    @property
    def untaught(self) -> int:
        """Number of sequences before the first one that the teacher answers as well."""
        return len(self.firsts) - (len(self.teacher.firsts) if self.teacher else 0)


@dataclass
class _Place:
    """What is asked of a place; the fields of :class:`TuningBatch`."""

    target: int = 0
    teacher: int = -1
    honest: float = 0.0
    neutral: float = 0.0
    retained: float = 0.0


class SycophancyDataModule(L.LightningDataModule):
    """Tuning data: what is asked of the model on training topics, with as much retention text beside it as asked.

    Args:
        model: whose tokenizer and prompt form to use; the command line takes it from ``--model.model``.
        records: where the records come from: ``embedded``, a JSONL file, ``anthropic:phil``, ``truthfulqa``, ...; or several
            with commas between them.
        validation: share of the topics for validation.
        test: share of the topics kept for the final measurement.
        split_seed: seed of the division of topics.
        max_records: at most so many training records, drawn evenly over topics; 0 means all.
        target: ``honest``: the honest answer (the paper's); ``neutral``: the words of both positions, to be as likely
            as the clean model finds them without the person (records without a neutral prompt are left out of it); ``mixed``: both;
            ``shift``: only that the log-odds of the two positions be those without the person (give ``--model.shift_weight``).
        honest_weight: weight of a token of the honest answer where the target is ``mixed``; a token of the two positions weighs
            1 minus this. Near 1 it is ``honest``, near 0 ``neutral``; the positions have about twice as many tokens.
        wrong_persons_only: leave out records whose person is right (target ``honest``).
        batch_tokens: tokens of one batch, retention text included; records of similar lengths come together.
        retention: source of the retention text (``python-docs``, a file, a folder, ``hub:<dataset>``), or None.
        retention_rows: pieces of retention text beside each batch of records.
        retention_tokens: tokens of one piece.
        retention_stride: take the KL at every so many-th token of a piece, from another first one in each piece: the head, which
            costs most where the vocabulary is large, then runs at those alone, so more text fits into the same time.
        seed: seed of the order and the batches.

    Attributes:
        retained: token ids of all pieces of retention text, once :meth:`setup` is done.
    """

    def __init__(
        self,
        model: str,
        records: str = "embedded",
        validation: float = 0.2,
        test: float = 0.2,
        split_seed: int = 0,
        max_records: int = 0,
        target: Target = "honest",
        honest_weight: float = 0.5,
        wrong_persons_only: bool = False,
        batch_tokens: int = 704,
        retention: str | None = "python-docs",
        retention_rows: int = 2,
        retention_tokens: int = 64,
        retention_stride: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_tokens", batch_tokens, 1),
            ("max_records", max_records, 0),
            ("retention_rows", retention_rows, 0),
            ("retention_stride", retention_stride, 1),
        ):
            if value < least:
                raise UserError(f"--data.{name} {value}: at least {least}")
        if not 0 < honest_weight < 1:
            raise UserError(f"--data.honest_weight {honest_weight}: above 0 and below 1; the ends are --data.target neutral and honest")
        self.model, self.records, self.seed = model, records, seed
        self.validation, self.test, self.split_seed, self.max_records = validation, test, split_seed, max_records
        self.target, self.wrong_persons_only = target, wrong_persons_only
        self.weights = (honest_weight, 1 - honest_weight) if target == "mixed" else _WEIGHTS[target]
        self.batch_tokens, self.retention = batch_tokens, retention
        self.retention_rows, self.retention_tokens, self.retention_stride = retention_rows, retention_tokens, retention_stride
        self._batches: dict[str, list[TuningBatch]] = {}
        self._train: ResumableLoader[TuningBatch] | None = None
        self._position: dict[str, int] = {}  # of a checkpoint
        self.retained: list[list[int]] = []

    @override
    def setup(self, stage: str) -> None:
        if self._batches:
            return
        split = load_split(self.records, self.validation, self.test, self.split_seed)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(self.model))
        texts = load_paragraphs(self.retention, "retention", self.seed) if self.retention and self.retention_rows else []
        self.retained = pieces = [tokenize_text(tokenizer, text)[: self.retention_tokens] for text in texts]
        train = draw_evenly(split.train, self.max_records, self.seed)
        self._batches = {
            "fit": self.make_batches(tokenizer, train, pieces),
            "validate": self.make_batches(tokenizer, split.validation, []),
            "test": self.make_batches(tokenizer, split.test, []),
        }

    def make_batches(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], pieces: Sequence[list[int]] = ()
    ) -> list[TuningBatch]:
        """Batches of some records, with pieces of retention text [tokens] beside them where there are any."""
        kept = [r for r in records if not (self.wrong_persons_only and r.person_is_right)]
        groups = [group for record in kept if (group := _ask(tokenizer, record, self.target))]
        if not groups:
            raise UserError(f"records {self.records}: none is fit for --data.target {self.target} on this side of the split")
        random.Random(self.seed).shuffle(groups)
        groups.sort(key=lambda group: len(group.tree.ids) // 8)  # similar lengths together, not always the same neighbours
        texts = itertools.cycle([_Group(prefix_tree([ids]), [0]) for ids in pieces])
        batches: list[TuningBatch] = []
        while groups:
            beside = [next(texts) for _ in range(self.retention_rows)] if pieces else []
            room = self.batch_tokens - sum(len(group.tree.ids) for group in beside)
            picked = _fitting(groups, room)
            batches.append(_collate(groups[:picked], beside, self.weights, self.retention_stride))
            groups = groups[picked:]
        return batches

    @override
    def train_dataloader(self) -> DataLoader[TuningBatch]:
        self._train = self._loader("fit", self.seed)
        if self._position:
            self._train.load_state_dict(self._position)
        return self._train

    @override
    def val_dataloader(self) -> DataLoader[TuningBatch]:
        return self._loader("validate")

    @override
    def test_dataloader(self) -> DataLoader[TuningBatch]:
        return self._loader("test")

    def _loader(self, side: str, seed: int | None = None) -> ResumableLoader[TuningBatch]:
        batches = self._batches[side]
        nothing = no_batch()
        if self.trainer is not None and type(self.trainer.strategy).__name__ == "ShardedStrategy":
            nothing = _idle(batches, self.target)
        return ResumableLoader([*batches, nothing], EpochOrder(batches, seed, rank_of(self.trainer)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._train.state_dict() if self._train else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict


class HasTopic(Protocol):
    """What can be drawn evenly over topics."""

    @property
    def topic(self) -> str:
        """What it is about."""


Topical = TypeVar("Topical", bound=HasTopic)


def draw_evenly(records: Sequence[Topical], limit: int, seed: int) -> list[Topical]:
    """At most ``limit`` records (0: all), one topic after the other so that all topics stay in."""
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    if not limit or limit >= len(shuffled):
        return shuffled
    turn: dict[str, int] = {}
    place = []
    for record in shuffled:
        turn[record.topic] = turn.get(record.topic, 0) + 1
        place.append(turn[record.topic])
    return [shuffled[i] for i in sorted(range(len(shuffled)), key=lambda i: (place[i], i))[:limit]]


def _ask(tokenizer: PreTrainedTokenizerBase, record: Record, target: Target) -> _Group | None:
    """What ``target`` asks of a record; None where that is nothing."""
    honest = [record.honest] if target in ("honest", "mixed") else []
    if not record.neutral_prompt or target == "honest":
        return _group(tokenizer, record.prompt, honest) if honest else None
    teacher = _group(tokenizer, record.neutral_prompt, record.scored)
    return _group(tokenizer, record.prompt, [*honest, *record.scored], teacher)


def _group(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Turn], answers: Sequence[str], teacher: _Group | None = None) -> _Group:
    ids = [tokenize(tokenizer, prompt, answer) for answer in answers]
    return _Group(prefix_tree([t.prompt + t.answer for t in ids]), [len(t.prompt) - 1 for t in ids], teacher)


def _fitting(groups: Sequence[_Group], room: int) -> int:
    """How many of the first groups have room for their tokens; one at least."""
    totals = itertools.accumulate(len(group.tree.ids) for group in groups)
    return max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= room, totals)))


def _collate(answers: Sequence[_Group], retained: Sequence[_Group], weights: tuple[float, float], stride: int = 1) -> TuningBatch:
    """One batch; ``weights`` of an honest token and of a taught one; every ``stride``-th token of retention text counts."""
    packed = pack([group.tree for group in (*answers, *retained)], _ROW_WIDTH)
    teachers = [group.teacher for group in answers if group.teacher]
    teacher = pack([group.tree for group in teachers], _ROW_WIDTH) if teachers else None
    teacher_starts = iter(teacher.starts if teacher else ())
    places: dict[int, _Place] = {}  # by flat place
    for group, start in zip(answers, packed.starts, strict=False):
        _add_answers(places, group, start, next(teacher_starts) if group.teacher else 0, weights)
    for number, (group, start) in enumerate(zip(retained, packed.starts[len(answers) :], strict=True)):
        places |= {start + node: _Place(retained=1.0) for node in group.tree.paths[0][number % stride : -1 : stride]}
    ordered = sorted(places.items(), key=lambda item: (item[1].retained > 0, item[1].teacher < 0))
    at = torch.tensor([place for place, _ in ordered])
    targets, there, honest, neutral, kept = (torch.tensor(column) for column in zip(*(astuple(asked) for _, asked in ordered), strict=True))
    asked = TeacherBatch(teacher.rows, there[there >= 0]) if teacher else None
    read = [(packed.rows, at), *([asked] if asked else [])]
    key = digest_json([[t.tolist() for t in (rows.input_ids, rows.positions, rows.ends, places)] for rows, places in read])
    pairs = _pairs(answers, packed.starts, {place: number for number, (place, _) in enumerate(ordered)}) if teacher else None
    return TuningBatch(packed.rows, at, targets, honest, neutral, kept, asked, key, pairs)


def _pairs(groups: Sequence[_Group], starts: Sequence[int], numbers: Mapping[int, int]) -> Pairs:
    """Both positions of each group that has a teacher; ``numbers`` are those of the places by flat place."""
    rows: list[tuple[int, int, int, float]] = []
    taught = [(group, start) for group, start in zip(groups, starts, strict=False) if group.teacher]
    for record, (group, start) in enumerate(taught):
        agreeing, other = group.tree.paths[group.untaught :]
        alike = max(common_prefix(agreeing, other) - 1, group.firsts[-1])  # of what both share, only the last place tells them apart
        for sign, path in ((1.0, agreeing), (-1.0, other)):
            rows += [(numbers[start + path[s]], group.tree.ids[path[s + 1]], record, sign) for s in range(alike, len(path) - 1)]
    at, targets, records, signs = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Pairs(at, targets, records, signs, len(taught))


def _add_answers(places: dict[int, _Place], group: _Group, start: int, teacher_start: int, weights: tuple[float, float]) -> None:
    """Supervise the answers of a group whose trees begin at flat places ``start`` and, the teacher's, ``teacher_start``.

    Of honest answers there is one, and each node of a tree has one way from the root: a place has one target and one teacher.
    """
    for number, (path, first) in enumerate(zip(group.tree.paths, group.firsts, strict=True)):
        taught = number - group.untaught
        for step in range(first, len(path) - 1):
            place = places.setdefault(start + path[step], _Place())
            if group.teacher and taught >= 0:
                place.teacher = teacher_start + group.teacher.tree.paths[taught][step - first + group.teacher.firsts[taught]]
                place.neutral += weights[1]
            else:
                place.target = group.tree.ids[path[step + 1]]
                place.honest += weights[0]
