"""Prefix trees, rows and batches, by hand and against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bad_neurons.batching import batches_by_length, common_prefix, group_by_prefix, pack, pack_sequences, prefix_tree, shared_batches

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6)


def test_a_tree_by_hand():
    tree = prefix_tree([[7, 8, 9], [7, 8, 5, 6], [7, 4]])
    assert tree.ids == [7, 4, 8, 5, 6, 9]  # depth first, branches in lexical order
    assert tree.positions == [0, 1, 1, 2, 3, 2]
    assert tree.ends == [6, 2, 6, 5, 5, 6]
    assert tree.paths == [[0, 2, 5], [0, 2, 3, 4], [0, 1]]


def test_one_sequence_is_its_own_tree():
    assert prefix_tree([[3, 1, 2]]) == ([3, 1, 2], [0, 1, 2], [3, 3, 3], [[0, 1, 2]])


@given(SEQUENCES)
@settings(deadline=None)
def test_every_sequence_is_the_path_to_its_end(sequences):
    tree = prefix_tree(sequences)
    assert [[tree.ids[node] for node in path] for path in tree.paths] == sequences
    assert all([tree.positions[node] for node in path] == list(range(len(path))) for path in tree.paths)
    assert len(tree.ids) == len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})  # nothing twice


@given(st.lists(SEQUENCES, min_size=1, max_size=4), st.sampled_from([0, 5, 20]))
@settings(deadline=None, max_examples=50)
def test_a_token_reaches_its_own_beginning_and_nothing_else(forest, width):
    trees = [prefix_tree(sequences) for sequences in forest]
    rows, starts = pack(trees, width)
    T = rows.input_ids.shape[1]
    expected = torch.eye(T, dtype=torch.bool).repeat(len(rows.input_ids), 1, 1)
    for tree, start in zip(trees, starts, strict=True):
        for path in tree.paths:
            for step, node in enumerate(path):
                row, column = divmod(start + node, T)
                expected[row, column, [start % T + before for before in path[: step + 1]]] = True
    assert torch.equal(rows.reach(), expected)
    assert int(rows.attention_mask.sum()) == sum(len(tree.ids) for tree in trees)
    assert len(rows.input_ids) == len(trees) if width == 0 else max(width, *(len(tree.ids) for tree in trees)) >= T


def test_rows_by_hand():
    rows, starts = pack([prefix_tree([[5, 6]]), prefix_tree([[7, 8, 9], [7, 1]]), prefix_tree([[4]])], width=6)
    assert rows.input_ids.tolist() == [[7, 1, 8, 9], [5, 6, 4, 0]]  # six columns would be [7 1 8 9 5 6] and [4 0 0 0 0 0]
    assert rows.attention_mask.tolist() == [[1] * 4, [1, 1, 1, 0]]
    assert rows.positions.tolist() == [[0, 1, 1, 2], [0, 1, 0, 0]]
    assert rows.ends.tolist() == [[4, 2, 4, 4], [2, 2, 3, 0]]
    assert starts == [4, 0, 6]
    assert rows.branched


@pytest.mark.parametrize(
    ("forest", "width", "branched"),
    [
        ([[[1, 2]], [[3]]], 0, False),
        ([[[1, 2]], [[3]]], 4, True),  # two in one row
        ([[[1, 2], [1, 3]]], 0, True),
        ([[[1, 2], [1]]], 0, False),
        ([[[1], [2]]], 0, True),
    ],
)
def test_branched_where_a_row_is_more_than_one_sequence(forest, width, branched):
    assert pack([prefix_tree(sequences) for sequences in forest], width).rows.branched is branched


def test_pack_sequences():
    rows = pack_sequences([[5, 6], [7], [8, 9, 10]])
    assert rows.input_ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert rows.attention_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert not rows.branched


def test_common_prefix():
    assert [common_prefix(*pair) for pair in (([], [1]), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3]), ([4], [1]))] == [0, 1, 2, 0]


def test_groups_share_at_least_what_they_add():
    prompt = list(range(10, 20))
    sequences = [[*prompt, 1, 2], [9, 9, 9], [*prompt, 1, 3], [*prompt, *range(50, 70)], [9, 9, 8, 7, 6, 5]]
    assert group_by_prefix(sequences, 100) == [[4], [1], [0, 2], [3]] or group_by_prefix(sequences, 100) == [[4, 1], [0, 2], [3]]
    assert sorted(i for group in group_by_prefix(sequences, 100) for i in group) == [0, 1, 2, 3, 4]
    assert group_by_prefix([[*prompt, 1], [*prompt, 2], [*prompt, 3]], 12) == [[0, 1], [2]]  # 11 + 1 nodes, and no more


def test_batches_by_length():
    assert batches_by_length([3, 9, 4, 9, 1], max_tokens=12) == [[1], [3], [2, 0, 4]]  # 9, 9, then 3 rows of 4
    assert batches_by_length([3, 9, 4, 9, 1], max_tokens=18) == [[1, 3], [2, 0, 4]]
    assert batches_by_length([30], max_tokens=12) == [[0]]


@given(SEQUENCES, st.sampled_from([4, 12, 100]))
@settings(deadline=None, max_examples=50)
def test_shared_batches_hold_every_sequence_once(sequences, max_tokens):
    found = {}
    for numbers, paths, rows in shared_batches(sequences, max_tokens):
        ids, positions = rows.input_ids.flatten(), rows.positions.flatten()
        assert rows.input_ids.numel() <= max_tokens or len(rows.input_ids) == 1
        for number, path in zip(numbers, paths, strict=True):
            assert number not in found
            found[number] = ids[path].tolist()
            assert positions[path].tolist() == list(range(len(path)))
    assert [found[number] for number in range(len(sequences))] == sequences


def test_places_that_another_token_follows():
    rows = pack_sequences([[5, 6, 7], [8], [9, 4]])
    assert rows.followed().tolist() == [0, 1, 6]
