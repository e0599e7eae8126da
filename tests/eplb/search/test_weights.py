"""Shares of copies: they add up, look at home first, even rank loads out, and leave no hash without a copy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.traces import lognormal, sample
from moe_serve.base.errors import ConfigError
from moe_serve.eplb.nodes import even_nodes
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Floats, Problem, problem_of
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.policies.sticky import sticky
from moe_serve.eplb.search.scores import mean_of_ratios, peaks, rank_loads, sum_by_rank
from moe_serve.eplb.search.weights import Split, even_split, solve_split, split_loads
from tests.eplb.problems import problems
from tests.eplb.search.slow_shares import cumulative, shares_from


@st.composite
def splits(draw: st.DrawFn) -> tuple[Split, Floats, Problem]:
    """A solved split, its load by source rank (R, L, E) and its problem; copies may share a rank."""
    problem = draw(problems(most_experts=6, most_ranks=5))
    placement = draw(st.sampled_from([shuffle, sticky]))(problem)
    generator = np.random.default_rng(draw(st.integers(0, 9)))
    shape = (problem.num_ranks, *problem.load_LE.shape)
    load_RLE = generator.integers(0, 9, shape).astype(float)
    split = solve_split(placement, load_RLE, node_sizes=problem.node_sizes, prefer_local=draw(st.booleans()))
    return split, load_RLE, problem


@given(splits())
def test_shares_from_every_rank_sum_to_one_for_every_expert(case: tuple[Split, Floats, Problem]) -> None:
    split, _, problem = case
    for rank in range(problem.num_ranks):
        shares_LP = shares_from(split, rank)
        assert shares_LP.min() >= 0
        for layer, row in enumerate(split.placement.physical_to_logical_LP):
            sums = np.bincount(row, weights=shares_LP[layer], minlength=problem.num_experts)
            assert np.allclose(sums, 1)


@given(splits())
def test_rank_loads_are_those_of_the_shares_of_all_sources(case: tuple[Split, Floats, Problem]) -> None:
    split, load_RLE, problem = case
    table_LP = split.placement.physical_to_logical_LP
    layers = np.arange(problem.num_layers)[:, None]
    summed = sum(load_RLE[rank][layers, table_LP] * shares_from(split, rank) for rank in range(problem.num_ranks))
    assert np.allclose(summed, split_loads(split, load_RLE))
    assert np.isclose(split_loads(split, load_RLE).sum(), load_RLE.sum())


@given(splits())
def test_a_copy_on_the_rank_is_taken_first_then_one_on_the_node(case: tuple[Split, Floats, Problem]) -> None:
    split, _, problem = case
    if not split.prefer_local:
        return
    rank_P = split.placement.rank_of_slot()
    node_R = problem.node_of_rank
    for rank in range(problem.num_ranks):
        shares_LP = shares_from(split, rank)
        for layer, row in enumerate(split.placement.physical_to_logical_LP):
            for expert in range(problem.num_experts):
                slots = row == expert
                here, near = slots & (rank_P == rank), slots & (node_R[rank_P] == node_R[rank])
                allowed = here if here.any() else near if near.any() else slots
                assert np.isclose(shares_LP[layer, allowed].sum(), 1)


@given(splits(), st.floats(0, 1, exclude_max=True))
def test_every_hash_finds_a_copy_of_its_expert_that_has_a_share(
    case: tuple[Split, Floats, Problem], token: float
) -> None:
    split, _, problem = case
    layers = np.arange(problem.num_layers)[:, None]
    for rank in range(problem.num_ranks):
        slot_LEC, total_LEC = cumulative(split, rank)
        assert (np.diff(total_LEC, axis=2) >= 0).all()
        assert (total_LEC[:, :, -1] == 1).all()
        nth_LE = (total_LEC <= token).sum(axis=2)
        slot_LE = np.take_along_axis(slot_LEC, nth_LE[:, :, None], axis=2)[:, :, 0]
        assert (split.placement.physical_to_logical_LP[layers, slot_LE] == np.arange(problem.num_experts)).all()
        assert (shares_from(split, rank)[layers, slot_LE] > 0).all()


def test_hashes_spread_over_the_copies_as_the_shares_say() -> None:
    placement = Placement(np.array([[0, 1, 0, 0]]), (0, 2, 3, 4), 2)
    split = solve_split(placement, np.array([[90.0, 30.0]]))
    slot_LEC, total_LEC = cumulative(split, 0)
    hashes = (np.arange(10_000) + 0.5) / 10_000
    chosen = slot_LEC[0, 0, (total_LEC[0, 0] <= hashes[:, None]).sum(axis=1)]
    shares = np.bincount(chosen, minlength=4) / 10_000
    assert np.allclose(shares, shares_from(split, 0)[0] * [1, 0, 1, 1], atol=1e-3)
    # The rank of slot 0 computes all of expert 1 too, so it should take less of expert 0: 10 of 90.
    assert np.allclose(shares, [10 / 90, 0, 40 / 90, 40 / 90], atol=0.02)


@given(splits())
def test_no_layer_is_worse_off_than_with_even_shares(case: tuple[Split, Floats, Problem]) -> None:
    split, load_RLE, problem = case
    even = even_split(split.placement, node_sizes=problem.node_sizes, prefer_local=split.prefer_local)
    solved_L, even_L = (
        peaks(sum_by_rank(split_loads(which, load_RLE), split.placement.offsets)) for which in (split, even)
    )
    assert (solved_L <= even_L + 1e-9).all()


def test_ten_sweeps_bring_a_drifted_load_close_to_balance() -> None:
    generator = np.random.default_rng(0)
    first, second = lognormal(generator, 2, 6, 256, rho=0.98)
    load_LE = sample(generator, first, tokens=16384 * 50)
    placement = sticky(problem_of(load_LE, num_ranks=32, num_redundant=64))
    drifted_LE = sample(generator, second, tokens=16384 * 50).astype(float)
    even = mean_of_ratios(rank_loads(drifted_LE, placement))
    uneven = mean_of_ratios(rank_loads(drifted_LE, placement, solve_split(placement, drifted_LE).anywhere_LP))
    assert even < 0.92
    assert uneven > 0.97


@pytest.mark.parametrize("by_source", [False, True])
def test_local_preference_is_solved_with_what_stays_local_taken_as_given(by_source: bool) -> None:
    generator = np.random.default_rng(1)
    load_LE = sample(generator, lognormal(generator, 1, 4, 256)[0], tokens=16384 * 50).astype(float)
    placement = sticky(problem_of(load_LE, num_ranks=32, num_redundant=64, num_nodes=4))
    load = load_LE * generator.dirichlet(np.full(32, 2.0), load_LE.shape).transpose(2, 0, 1) if by_source else load_LE
    scores = [
        mean_of_ratios(sum_by_rank(split_loads(split, load), placement.offsets))
        for split in (
            even_split(placement, node_sizes=even_nodes(32, 4), prefer_local=True),
            solve_split(placement, load, node_sizes=even_nodes(32, 4), prefer_local=True),
        )
    ]
    assert scores[1] > scores[0] + 0.02


def test_a_load_of_another_shape_is_refused() -> None:
    placement = Placement(np.array([[0, 1, 0]]), (0, 2, 3), 2)
    with pytest.raises(ConfigError, match=r"\[1, 2\] \(layers, experts\) or \[2, 1, 2\]"):
        solve_split(placement, np.ones((2, 2)))
