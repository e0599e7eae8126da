"""Nodes from the names of those who started the engines: whatever sizes they have, in whatever order they come."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.errors import ConfigError
from moe_serve.base.topology import Topology
from moe_serve.eplb.nodes import even_nodes, node_of_rank, nodes_of_engines, nodes_of_ranks, nodes_of_workers
from moe_serve.eplb.policies.base import Problem

NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=12)


@given(NAMES, st.integers(1, 4))
def test_neighbours_of_one_launcher_share_a_node_and_nobody_else(names: list[str], tp: int) -> None:
    sizes = nodes_of_engines(names, tp)
    node_R = nodes_of_ranks(sizes)
    assert len(node_R) == len(names) * tp
    assert [node_of_rank(sizes, rank) for rank in range(len(node_R))] == node_R.tolist()
    for dp in range(len(names)):
        assert len(set(node_R[dp * tp : (dp + 1) * tp])) == 1, "an engine is on one node"
    for (before, mine), (dp, _) in zip(pairwise(names), enumerate(names), strict=False):
        assert (node_R[(dp + 1) * tp] == node_R[dp * tp]) == (before == mine)


@given(st.integers(1, 40), st.data())
def test_even_nodes_differ_by_at_most_one_rank(num_ranks: int, data: st.DataObject) -> None:
    sizes = even_nodes(num_ranks, data.draw(st.integers(1, num_ranks)))
    assert sum(sizes) == num_ranks
    assert max(sizes) - min(sizes) <= 1
    assert sorted(sizes, reverse=True) == list(sizes)


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        (Topology(tp=4, nodes=2), (2, 2)),
        (Topology(pp=2, tp=2, nodes=2), (2,)),  # each stage on a node of its own
        (Topology(pp=2, tp=4, nodes=4), (2, 2)),
        (Topology(pp=2, tp=3, nodes=3), (1, 1, 1)),  # 0 and 1 share a node in one stage only
    ],
    ids=str,
)
def test_tensor_ranks_of_one_engine_share_a_node_if_they_do_in_each_stage(
    topology: Topology, sizes: tuple[int, ...]
) -> None:
    assert nodes_of_workers(topology) == sizes


def test_without_sizes_all_ranks_are_on_one_node() -> None:
    assert {node_of_rank((), rank) for rank in range(5)} == {0}
    assert Problem(np.ones((1, 4)), (0, 2, 4)).node_sizes == (2,)


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 1, 1), (2, 0)])
def test_nodes_that_are_not_those_of_the_world_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="add up to the 2 ranks"):
        Problem(np.ones((1, 4)), (0, 2, 4), sizes)
