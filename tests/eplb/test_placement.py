"""First placements of experts on ranks, whatever divides, and what a placement must fulfil."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.eplb.placement import Placement, initial_placement

strategies = st.sampled_from(["linear", "round_robin"])


def placed(strategy: str, experts: int, ranks: int, layers: int = 2) -> Placement:
    return initial_placement(strategy, num_layers=layers, num_experts=experts, num_ranks=ranks)


def held(placement: Placement, layer: int = 0) -> list[list[int]]:
    return [placement.logical_of(layer, rank).tolist() for rank in range(placement.num_ranks)]


def test_linear_keeps_neighbours_together_and_the_first_ranks_hold_the_remainder() -> None:
    assert held(placed("linear", 10, 4)) == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


def test_round_robin_deals_experts_out() -> None:
    assert held(placed("round_robin", 10, 4)) == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]


def test_more_ranks_than_experts_leave_some_ranks_empty() -> None:
    assert held(placed("linear", 2, 4)) == [[0], [1], [], []]
    assert held(placed("round_robin", 2, 4)) == [[0], [1], [], []]


@given(strategies, st.integers(1, 40), st.integers(1, 9), st.integers(1, 3))
def test_every_expert_has_one_slot_and_ranks_differ_by_one(
    strategy: str, experts: int, ranks: int, layers: int
) -> None:
    placement = placed(strategy, experts, ranks, layers)
    placement.check()
    assert placement.num_physical == experts
    for layer in range(layers):
        holdings = held(placement, layer)
        assert sorted(expert for of_rank in holdings for expert in of_rank) == list(range(experts))
        sizes = [len(of_rank) for of_rank in holdings]
        assert max(sizes) - min(sizes) <= 1


@given(strategies, st.integers(1, 20), st.integers(1, 6))
def test_owners_slots_and_first_replicas_agree(strategy: str, experts: int, ranks: int) -> None:
    placement = placed(strategy, experts, ranks)
    owners = placement.rank_of_slot()
    for rank in range(ranks):
        assert all(owners[slot] == rank for slot in placement.slots_of(rank))
    slots = placement.first_replica(1)
    assert placement.physical_to_logical_LP[1, slots].tolist() == list(range(experts))


def test_the_first_of_several_copies_is_the_lowest_slot() -> None:
    placement = Placement(np.array([[2, 0, 1, 0, 2]]), (0, 3, 5), 3)
    assert placement.first_replica(0).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("row", "offsets", "message"),
    [
        ([0, 1, 1], (0, 2, 3), r"layer 0 holds no copy of experts \[2\]"),
        ([0, 1, 3], (0, 2, 3), "outside"),
        ([0, 1, -1], (0, 2, 3), "outside"),
        ([0, 1, 2], (0, 2), "do not cover"),
        ([0, 1, 2], (1, 2, 3), "do not cover"),
        ([0, 1, 2], (0, 3, 2, 3), "do not cover"),
    ],
)
def test_a_placement_that_lacks_or_invents_something_is_refused(
    row: list[int], offsets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(np.array([row]), offsets, 3).check()


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown expert placement strategy 'random'; known are linear, round_robin"):
        placed("random", 4, 2)
