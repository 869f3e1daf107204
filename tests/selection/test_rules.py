"""Rules of choice, by hand and against a brute force."""

from __future__ import annotations

from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bad_neurons.errors import UserError
from bad_neurons.selection.rules import RULES, Rule, everything, same_counts, top_fraction, top_k_per_layer, top_p

SCORES = {3: torch.tensor([1.0, 4.0, 0.0]), 1: torch.tensor([2.0, 0.0, 3.0])}  # sum 10; best first: 4, 3, 2, 1

numbers = st.lists(st.integers(0, 40), min_size=1, max_size=6)
layers = st.dictionaries(st.integers(0, 9), numbers, min_size=1, max_size=4)


def flat(chosen):
    return {(layer, index) for layer, indices in chosen.items() for index in indices}


def tensors(scores):
    return {layer: torch.tensor(values, dtype=torch.float32) for layer, values in scores.items()}


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.1, {3: [1]}),
        (0.4, {3: [1]}),  # 4 of 10 is exactly enough
        (0.41, {1: [2], 3: [1]}),
        (0.7, {1: [2], 3: [1]}),
        (0.75, {1: [0, 2], 3: [1]}),
        (0.9, {1: [0, 2], 3: [1]}),
        (1.0, {1: [0, 2], 3: [0, 1]}),  # the two zeros hold nothing
    ],
)
def test_top_p(share, expected):
    assert top_p(SCORES, share) == expected


def test_top_p_ties_go_to_the_lower_layer_and_index():
    ties = {2: torch.ones(3), 0: torch.ones(2)}
    assert top_p(ties, 0.2) == {0: [0]}
    assert top_p(ties, 0.6) == {0: [0, 1], 2: [0]}


def test_top_p_of_nothing_is_nothing():
    assert top_p({0: torch.zeros(3)}, 0.5) == {}


def test_top_p_of_everything_has_no_zeros_whatever_the_rounding():
    for seed in range(20):
        scores = torch.rand(1000, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-9
        assert top_p({0: torch.cat([scores, torch.zeros(50)])}, 1.0) == {0: list(range(1000))}


@settings(deadline=None, max_examples=150)
@given(layers, st.integers(1, 16))
def test_top_p_is_the_smallest_set_that_holds_the_share(scores, sixteenths):
    chosen = flat(top_p(tensors(scores), sixteenths / 16))
    everything = {(layer, index): Fraction(v) for layer, values in scores.items() for index, v in enumerate(values)}
    need = Fraction(sixteenths, 16) * sum(everything.values())
    held = sorted((everything[at] for at in chosen), reverse=True)
    assert sum(held) >= need
    assert held == sorted(everything.values(), reverse=True)[: len(held)]  # the best ones
    assert not held or sum(held[:-1]) < need  # one fewer would not do


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.01, {3: [1]}), (0.34, {1: [2], 3: [1]}), (0.5, {1: [0, 2], 3: [1]}), (1.0, {1: [0, 1, 2], 3: [0, 1, 2]})],
)
def test_top_fraction(share, expected):
    assert top_fraction(SCORES, share) == expected


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, {1: [2], 3: [1]}), (2, {1: [0, 2], 3: [0, 1]}), (9, {1: [0, 1, 2], 3: [0, 1, 2]})],
)
def test_top_k_per_layer(k, expected):
    assert top_k_per_layer(SCORES, k) == expected


def test_same_counts():
    assert same_counts(SCORES, 0.0, {3: 2, 1: 1}) == {1: [2], 3: [0, 1]}
    assert same_counts(SCORES, 0.0, {3: 1, 1: 0}) == {3: [1]}


@settings(deadline=None, max_examples=60)
@given(layers, st.sampled_from([0.1, 0.3, 0.5, 1.0]), st.randoms())
def test_same_counts_has_the_counts_of_the_other_choice(scores, share, chance):
    counts = {layer: len(indices) for layer, indices in top_fraction(tensors(scores), share).items()}
    other = {layer: chance.sample(range(len(values)), len(values)) for layer, values in scores.items()}
    chosen = same_counts(tensors(other), 0.0, counts)
    assert {layer: len(indices) for layer, indices in chosen.items()} == counts
    for layer, indices in chosen.items():
        assert {other[layer][i] for i in indices} == set(sorted(other[layer], reverse=True)[: counts[layer]])


@pytest.mark.parametrize(
    ("like", "said"),
    [
        (None, "--like: rule same_counts copies the counts of another choice"),
        ({1: 4}, r"--like: it has 4 neurons in layer 1, which has 3 on this axis"),
        ({2: 1}, r"--like: it has 1 neurons in layer 2, which is not among the candidates \[1, 3\]"),
    ],
)
def test_same_counts_refuses_what_it_cannot_copy(like, said):
    with pytest.raises(UserError, match=said):
        same_counts(SCORES, 0.0, like)


def test_all():
    assert everything(SCORES, 0.0) == {1: [0, 1, 2], 3: [0, 1, 2]}


def test_every_rule_is_listed():
    named = {"top_p": top_p, "top_fraction": top_fraction, "top_k_per_layer": top_k_per_layer, "same_counts": same_counts}
    assert {**named, "all": everything} == RULES
    assert set(get_args(Rule)) == set(RULES)
