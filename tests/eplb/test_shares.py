"""Tables of shares for all ranks in one pass: the same numbers as rank by rank, and few bytes for many ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.commands import SetShares
from moe_serve.eplb.policies.base import Floats, Problem
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.policies.sticky import sticky
from moe_serve.eplb.search.scores import sum_by_rank
from moe_serve.eplb.search.weights import Split, solve_split, split_loads
from moe_serve.eplb.shares import table_of_node, table_of_rank
from tests.eplb.problems import problems
from tests.eplb.search.slow_shares import cumulative


@st.composite
def cases(draw: st.DrawFn) -> tuple[Split, Floats, Problem]:
    """A split solved for a load (L, E) whose sources are not known, and its problem; copies may share a rank."""
    problem = draw(problems(most_experts=6, most_ranks=6))
    placement = draw(st.sampled_from([shuffle, sticky]))(problem)
    load_LE = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 99, problem.load_LE.shape).astype(float)
    split = solve_split(placement, load_LE, node_sizes=problem.node_sizes, prefer_local=draw(st.booleans()))
    return split, load_LE, problem


@given(cases())
def test_what_a_rank_makes_of_its_nodes_table_is_what_was_worked_out_for_it_alone(
    case: tuple[Split, Floats, Problem],
) -> None:
    split, _, problem = case
    tables = {node: table_of_node(split, node).tobytes() for node in range(problem.num_nodes)}
    order = SetShares(epoch=0, shares=tables, node_sizes=problem.node_sizes, local_first=split.prefer_local)
    assert {len(table) for table in tables.values()} == {split.placement.physical_to_logical_LP.size * 4}
    layers = range(problem.num_layers)
    for stage in (layers, layers[1:], layers[:1], range(0)):  # a pipeline stage has some of them
        rows = {layer: split.placement.physical_to_logical_LP[layer].tolist() for layer in stage}
        for rank in range(problem.num_ranks):
            expected = cumulative(split, rank)[1][list(stage)].astype(np.float32)
            found = table_of_rank(order, rows, split.placement, rank, layers=layers)
            wide = expected[:, :, : found.shape[2]]  # to the expert with most copies, of these layers
            assert np.array_equal(found, wide)
            assert (expected[:, :, found.shape[2] :] == 1).all()


@given(cases())
def test_sources_that_are_not_known_count_as_if_every_rank_sent_the_same(case: tuple[Split, Floats, Problem]) -> None:
    split, load_LE, problem = case
    load_RLE = np.broadcast_to(load_LE / problem.num_ranks, (problem.num_ranks, *load_LE.shape))
    by_source = solve_split(split.placement, load_RLE, node_sizes=problem.node_sizes, prefer_local=split.prefer_local)
    assert np.allclose(split_loads(split, load_LE), split_loads(split, load_RLE))
    peaks = [
        sum_by_rank(split_loads(each, load_LE), split.placement.offsets).max(axis=1) for each in (split, by_source)
    ]
    assert np.allclose(*peaks), "neither finds better shares than the other"
    assert np.allclose(split.anywhere_LP, by_source.anywhere_LP)
    assert np.allclose(split.on_node_LP, by_source.on_node_LP)


@given(cases())
def test_the_shares_of_some_layers_do_not_depend_on_the_others(case: tuple[Split, Floats, Problem]) -> None:
    split, load_LE, problem = case
    layers = list(range(problem.num_layers))[::-2][::-1]
    some = solve_split(
        split.placement.of_layers(layers),
        load_LE[layers],
        node_sizes=problem.node_sizes,
        prefer_local=split.prefer_local,
    )
    assert np.array_equal(some.anywhere_LP, split.anywhere_LP[layers])
    assert np.array_equal(some.on_node_LP, split.on_node_LP[layers])
