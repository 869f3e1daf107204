"""From token sequences to the rows that a model reads: shared beginnings once, little padding, batches by length.

Sequences that begin alike (one prompt, several answers) become one prefix tree, written down depth first. A node sees the
nodes on its way from the root and no others, at the position that it would have in its own sequence, so every sequence
gets the hidden states that it would get alone. Several trees may lie in one row: they do not see each other.

Legend: B rows, T columns, N places that are read out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WIDTH_STEP = 8  # columns between two widths that are tried


class Tree(NamedTuple):
    """Sequences that share beginnings, as nodes in depth-first order.

    Attributes:
        ids: token id of each node.
        positions: position of each node in its sequence.
        ends: number of the first node behind each node's descendants; node j is on the way to node i if j <= i < ends[j].
        paths: for each sequence, in the order given, the numbers of its nodes.
    """

    ids: list[int]
    positions: list[int]
    ends: list[int]
    paths: list[list[int]]


def prefix_tree(sequences: Sequence[Sequence[int]]) -> Tree:
    """The prefix tree of ``sequences``; of a single one it is the sequence itself."""
    tree = Tree([], [], [], [[] for _ in sequences])
    path: list[int] = []
    before: Sequence[int] = ()
    for number in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):  # neighbours share the most
        sequence = sequences[number]
        shared = common_prefix(before, sequence)
        for node in path[shared:]:
            tree.ends[node] = len(tree.ids)
        path = path[:shared]
        for position in range(shared, len(sequence)):
            path.append(len(tree.ids))
            tree.ids.append(sequence[position])
            tree.positions.append(position)
            tree.ends.append(0)
        tree.paths[number], before = path, sequence
        path = list(path)
    for node in path:
        tree.ends[node] = len(tree.ids)
    return tree


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the beginning that two sequences share."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def group_by_prefix(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Indices of sequences in groups that are worth a common tree.

    A sequence joins its neighbour (in lexical order) where it shares at least as many tokens as it adds, and the tree stays
    within ``max_tokens``: attention costs grow with the square of a row.
    """
    groups: list[list[int]] = []
    nodes = 0
    before: Sequence[int] = ()
    for number in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        shared = common_prefix(before, sequences[number])
        added = len(sequences[number]) - shared
        if groups and shared >= added and nodes + added <= max_tokens:
            groups[-1].append(number)
            nodes += added
        else:
            groups.append([number])
            nodes = len(sequences[number])
        before = sequences[number]
    return groups


class Rows(NamedTuple):
    """Trees in rows, padded on the right.

    Attributes:
        input_ids: [B, T], int64; 0 in the padding.
        attention_mask: [B, T], int64, 1 where there is a token.
        positions: [B, T], int64, position of each token in its sequence; 0 in the padding.
        ends: [B, T], int64, column behind each token's descendants; 0 in the padding.
        branched: False where every row holds one sequence alone, so that the model's own mask is the right one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    ends: Tensor
    branched: bool

    def to(self, device: torch.device | str) -> Rows:
        """The same on ``device``."""
        ids, mask, positions, ends = (t.to(device) for t in (self.input_ids, self.attention_mask, self.positions, self.ends))
        return Rows(ids, mask, positions, ends, self.branched)

    def followed(self) -> Tensor:
        """Flat places (row * T + column) that another token of the same row follows, where each row holds one sequence."""
        return (self.attention_mask.flatten()[:-1] * self.positions.flatten()[1:]).nonzero().squeeze(-1)

    def reach(self) -> Tensor:
        """[B, T, T] bool: whether the token of the last axis is on the way to that of the middle axis; padding sees itself."""
        column = torch.arange(self.ends.shape[1], device=self.ends.device)
        behind = column[:, None] >= column
        return (behind & (column[:, None] < self.ends[:, None, :])) | torch.eye(len(column), dtype=torch.bool, device=self.ends.device)


class Packed(NamedTuple):
    """Rows, and where each tree lies in them.

    Attributes:
        rows: the rows.
        starts: flat place (row * T + column) of the first node of each tree, in the order given.
    """

    rows: Rows
    starts: list[int]


def pack(trees: Sequence[Tree], width: int = 0) -> Packed:
    """Lay trees into rows.

    Args:
        trees: what to lay out.
        width: rows may hold several trees and be up to so many columns wide (as wide as the longest tree at least); of these
            widths the one with the least padding is taken. 0 gives each tree a row of its own.
    """
    sizes = [len(tree.ids) for tree in trees]
    widest = max(sizes)
    layouts = (
        [_first_fit(sizes, w) for w in (*range(widest, width, _WIDTH_STEP), max(widest, width))]
        if width
        else [[(i, 0) for i in range(len(sizes))]]
    )
    places, B, T = min(((places, *_extent(places, sizes)) for places in layouts), key=lambda layout: layout[1] * layout[2])
    ids, mask, positions, ends = (torch.zeros(B, T, dtype=torch.long) for _ in range(4))
    for (row, start), tree in zip(places, trees, strict=True):
        span = slice(start, start + len(tree.ids))
        ids[row, span], positions[row, span] = torch.as_tensor(tree.ids), torch.as_tensor(tree.positions)
        mask[row, span], ends[row, span] = 1, torch.as_tensor(tree.ends) + start
    branched = len(trees) > B or any(len(tree.ids) > tree.positions[-1] + 1 for tree in trees)
    return Packed(Rows(ids, mask, positions, ends, branched), [row * T + start for row, start in places])


def _first_fit(sizes: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Row and first column of each piece: longest first, into the first row with room for it."""
    used: list[int] = []
    places: dict[int, tuple[int, int]] = {}
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, taken in enumerate(used) if taken + sizes[number] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[number] = (row, used[row])
        used[row] += sizes[number]
    return [places[number] for number in range(len(sizes))]


def _extent(places: Sequence[tuple[int, int]], sizes: Sequence[int]) -> tuple[int, int]:
    """Rows and columns that pieces take."""
    return max(row for row, _ in places) + 1, max(start + size for (_, start), size in zip(places, sizes, strict=True))


def pack_sequences(sequences: Sequence[Sequence[int]]) -> Rows:
    """Each sequence in a row of its own."""
    return pack([prefix_tree([sequence]) for sequence in sequences]).rows


class SharedBatch(NamedTuple):
    """Sequences that are read together, what they share once.

    Attributes:
        numbers: which sequences.
        paths: of each, the flat places (row * T + column) of its tokens in the rows.
        rows: the rows.
    """

    numbers: list[int]
    paths: list[list[int]]
    rows: Rows


def shared_batches(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[SharedBatch]:
    """All of ``sequences`` in batches of at most ``max_tokens`` after padding (one row at least)."""
    groups = group_by_prefix(sequences, max_tokens)
    trees = [prefix_tree([sequences[i] for i in group]) for group in groups]
    batches = []
    for batch in batches_by_length([len(tree.ids) for tree in trees], max_tokens):
        packed = pack([trees[i] for i in batch])
        paths = [[start + node for node in path] for i, start in zip(batch, packed.starts, strict=True) for path in trees[i].paths]
        batches.append(SharedBatch([number for i in batch for number in groups[i]], paths, packed.rows))
    return batches


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each at most ``max_tokens`` after padding (one row at least)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
