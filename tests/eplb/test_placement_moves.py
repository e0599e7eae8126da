"""Copies of experts, what has to travel between two placements, and which slots stay as they are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.eplb.placement import Placement, even_offsets, initial_placement, keep_slots, moves


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Placement, Placement]:
    """Two placements of one world; ranks may be of any size, copies may share a rank."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= experts))
    offsets = (0, *np.cumsum(sizes).tolist())

    def table() -> np.ndarray:
        rows = []
        for _ in range(layers):
            more = draw(
                st.lists(st.integers(0, experts - 1), min_size=sum(sizes) - experts, max_size=sum(sizes) - experts)
            )
            rows.append(draw(st.permutations([*range(experts), *more])))
        return np.array(rows, dtype=np.int64)

    return Placement(table(), offsets, experts), Placement(table(), offsets, experts)


def held(placement: Placement, layer: int, rank: int) -> Counter[int]:
    return Counter(placement.logical_of(layer, rank).tolist())


@given(pairs())
def test_copies_and_their_slots_agree_with_the_table(both: tuple[Placement, Placement]) -> None:
    placement = both[0]
    placement.check()
    copies, slots = placement.copies(), placement.logical_to_physical()
    for layer, row in enumerate(placement.physical_to_logical_LP.tolist()):
        for expert in range(placement.num_logical):
            where = [slot for slot, holds in enumerate(row) if holds == expert]
            assert copies[layer, expert] == len(where)
            assert [slot for slot in slots[layer, expert].tolist() if slot >= 0] == where
    assert np.array_equal(slots[:, :, 0], [placement.first_replica(layer) for layer in range(placement.num_layers)])


@given(pairs())
def test_duplicates_are_copies_beyond_the_first_on_a_rank(both: tuple[Placement, Placement]) -> None:
    placement = both[0]
    counted = sum(
        count - 1
        for layer in range(placement.num_layers)
        for rank in range(placement.num_ranks)
        for count in held(placement, layer, rank).values()
    )
    assert placement.num_duplicates() == counted


@given(pairs())
def test_moves_are_slots_whose_rank_did_not_hold_their_expert(both: tuple[Placement, Placement]) -> None:
    old, new = both
    expected = [
        (layer, slot, int(new.physical_to_logical_LP[layer, slot]))
        for layer in range(new.num_layers)
        for rank in range(new.num_ranks)
        for slot in new.slots_of(rank)
        if new.physical_to_logical_LP[layer, slot] not in held(old, layer, rank)
    ]
    made = moves(old, new)
    assert sorted(zip(made.layer.tolist(), made.slot.tolist(), made.expert.tolist(), strict=True)) == expected
    assert len(moves(old, old)) == 0


@given(pairs())
def test_keeping_slots_changes_no_rank_and_as_few_slots_as_possible(both: tuple[Placement, Placement]) -> None:
    old, new = both
    kept = keep_slots(old, new)
    kept.check()
    for layer in range(new.num_layers):
        for rank in range(new.num_ranks):
            assert held(kept, layer, rank) == held(new, layer, rank)
            stays = held(old, layer, rank) & held(new, layer, rank)
            same = old.logical_of(layer, rank) == kept.logical_of(layer, rank)
            assert np.count_nonzero(same) == stays.total()


def test_a_copy_from_the_same_rank_is_not_a_move() -> None:
    old = Placement(np.array([[0, 1, 1, 2]]), (0, 2, 4), 3)
    new = Placement(np.array([[0, 0, 1, 2]]), (0, 2, 4), 3)
    assert len(moves(old, new)) == 0
    assert keep_slots(old, new).physical_to_logical_LP.tolist() == [[0, 0, 1, 2]]


def test_placements_of_different_worlds_are_not_compared() -> None:
    small, large = (initial_placement("linear", num_layers=1, num_experts=e, num_ranks=2) for e in (4, 6))
    for compare in (moves, keep_slots):
        with pytest.raises(ValueError, match="different worlds"):
            compare(small, large)


@given(st.sampled_from(["linear", "round_robin"]), st.integers(1, 20), st.integers(1, 6), st.integers(0, 25))
def test_redundant_slots_begin_as_second_copies_of_the_first_experts(
    strategy: str, experts: int, ranks: int, redundant: int
) -> None:
    placement = initial_placement(strategy, num_layers=2, num_experts=experts, num_ranks=ranks, num_redundant=redundant)
    placement.check()
    assert placement.num_redundant == redundant
    assert sorted(np.diff(placement.offsets)) == sorted(np.diff(even_offsets(experts + redundant, ranks)))
    if redundant <= experts:
        assert placement.copies().max() <= 2


def test_round_robin_puts_a_second_copy_on_another_rank() -> None:
    placement = initial_placement("round_robin", num_layers=1, num_experts=8, num_ranks=4, num_redundant=4)
    assert placement.num_duplicates() == 0


def test_negative_redundancy_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        initial_placement("linear", num_layers=1, num_experts=8, num_ranks=4, num_redundant=-1)
