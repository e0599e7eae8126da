"""The published algorithm: its own example, and a slow word-for-word reading of it on random loads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.policies.base import problem_of
from moe_serve.eplb.policies.deepseek import deepseek, deepseek_global

EXAMPLE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_the_published_example_comes_out_exactly() -> None:
    problem = problem_of(EXAMPLE, num_ranks=8, num_redundant=4, num_nodes=2, num_groups=4)
    assert deepseek(problem).physical_to_logical_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def slow_packing(weights: list[np.float32], packs: int) -> list[list[int]]:
    """Items of each pack, in the order in which they came: one row at a time, as one would do it by hand."""
    if len(weights) == packs:
        return [[item] for item in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    load = [np.float32(0)] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        open_packs = [pack for pack in range(packs) if len(held[pack]) < len(weights) // packs]
        pack = min(open_packs, key=lambda pack: load[pack])
        held[pack].append(item)
        load[pack] += weights[item]
    return held


def slow_copies(weights: list[np.float32], slots: int) -> list[int]:
    experts = list(range(len(weights)))
    while len(experts) < slots:
        shares = [weights[e] / np.float32(experts.count(e)) for e in range(len(weights))]
        experts.append(shares.index(max(shares)))
    return experts


def slow_layer(load: list[int], ranks: int, slots: int, groups: int, nodes: int) -> list[int]:
    """Experts of all slots of a layer."""
    size = len(load) // groups
    weights = [np.float32(value) for value in load]
    group_weights = [np.array(weights[g * size : (g + 1) * size], dtype=np.float32).sum() for g in range(groups)]
    result = []
    for of_node in slow_packing(group_weights, nodes):
        experts = [group * size + i for group in of_node for i in range(size)]
        copies = slow_copies([weights[e] for e in experts], slots // nodes)
        shares = [weights[experts[c]] / np.float32(copies.count(c)) for c in copies]
        for of_rank in slow_packing(shares, ranks // nodes):
            result += [experts[copies[item]] for item in of_rank]
    return result


@given(st.data())
def test_any_load_gives_what_the_slow_reading_gives(data: st.DataObject) -> None:
    nodes, ranks_each, groups_each = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
    )
    size, slots_each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    groups, ranks = nodes * groups_each, nodes * ranks_each
    experts = groups * size
    slots = max(-(-experts // ranks), slots_each) * ranks
    if slots > experts * ranks:
        slots = ranks * experts
    loads = st.lists(st.integers(1, 500), min_size=experts, max_size=experts)
    load = data.draw(st.lists(loads, min_size=1, max_size=3))
    problem = problem_of(
        np.array(load), num_ranks=ranks, num_redundant=slots - experts, num_nodes=nodes, num_groups=groups
    )
    expected = [slow_layer(row, ranks, slots, groups, nodes) for row in load]
    assert deepseek(problem).physical_to_logical_LP.tolist() == expected
    whole = [slow_layer(row, ranks, slots, 1, 1) for row in load]
    assert deepseek_global(problem).physical_to_logical_LP.tolist() == whole


def test_groups_that_do_not_divide_over_the_nodes_mean_the_global_form() -> None:
    load = np.random.default_rng(0).integers(1, 100, (2, 12))
    odd = problem_of(load, num_ranks=6, num_nodes=2, num_groups=3)
    assert np.array_equal(deepseek(odd).physical_to_logical_LP, deepseek_global(odd).physical_to_logical_LP)


def test_a_hierarchy_with_ragged_ranks_is_refused_with_what_would_fit() -> None:
    problem = problem_of(np.ones((1, 12)), num_ranks=8, num_redundant=3, num_nodes=2, num_groups=4)
    with pytest.raises(ConfigError, match="4 redundant experts would fit, or 12"):
        deepseek(problem)


def test_without_nodes_ragged_ranks_are_packed_to_their_sizes() -> None:
    load = np.random.default_rng(1).integers(1, 100, (2, 10))
    placement = deepseek(problem_of(load, num_ranks=4, num_redundant=3))
    placement.check()
    assert np.diff(placement.offsets).tolist() == [4, 3, 3, 3]
