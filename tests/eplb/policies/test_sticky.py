"""The default policy: as balanced as the published one, copies apart, and few moves; numbers on made-up loads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.traces import khot, lognormal, noise, sample, topics, zipf
from moe_serve.eplb.desk.plan import cross_node_moves
from moe_serve.eplb.placement import Placement, initial_placement, moves
from moe_serve.eplb.policies.base import Floats, Problem, problem_of
from moe_serve.eplb.policies.deepseek import deepseek, deepseek_global
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.policies.sticky import sticky
from moe_serve.eplb.search.scores import mean_of_ratios, rank_loads
from moe_serve.eplb.search.weights import solve_split
from tests.eplb.problems import balancedness, least_peak, problems

EXPERTS, RANKS, NODES, LAYERS = 256, 32, 4, 6
GENERATED = {
    "zipf 0.5": lambda generator: zipf(generator, 1, LAYERS, EXPERTS, alpha=0.5),
    "zipf 1": lambda generator: zipf(generator, 1, LAYERS, EXPERTS),
    "zipf 1.5": lambda generator: zipf(generator, 1, LAYERS, EXPERTS, alpha=1.5),
    "lognormal": lambda generator: lognormal(generator, 1, LAYERS, EXPERTS),
    "khot": lambda generator: khot(generator, 1, LAYERS, EXPERTS),
    "topics": lambda generator: topics(generator, 1, LAYERS, EXPERTS),
}


def with_current(problem: Problem, current: Placement, load_LE: Floats | None = None) -> Problem:
    load_LE = problem.load_LE if load_LE is None else load_LE
    return Problem(load_LE, problem.offsets, problem.node_sizes, problem.num_groups, current)


@given(problems(most_experts=16, most_ranks=6))
def test_two_copies_of_an_expert_never_share_a_rank(problem: Problem) -> None:
    assert sticky(problem).num_duplicates() == 0
    assert sticky(with_current(problem, shuffle(problem))).num_duplicates() == 0


@given(problems(most_experts=16, most_ranks=6))
def test_the_same_load_again_moves_nothing(problem: Problem) -> None:
    first = sticky(with_current(problem, shuffle(problem)))
    again = sticky(with_current(problem, first))
    assert np.array_equal(again.physical_to_logical_LP, first.physical_to_logical_LP)
    fresh = sticky(problem)
    assert len(moves(fresh, sticky(with_current(problem, fresh)))) == 0


@given(problems(), st.data())
def test_a_layer_never_gets_worse(problem: Problem, data: st.DataObject) -> None:
    current = sticky(problem)
    load_LE = np.roll(problem.load_LE, data.draw(st.integers(0, 5)), axis=1)
    changed = with_current(problem, current, load_LE)
    assert balancedness(changed, sticky(changed)) >= balancedness(changed, current) - 1e-12


def tiny_problems(count: int) -> list[Problem]:
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        experts, ranks = int(generator.integers(2, 7)), int(generator.integers(2, 4))
        redundant = int(generator.integers(0, min(3, experts * (ranks - 1)) + 1))
        load_LE = np.exp(1.2 * generator.standard_normal((1, experts)))
        made.append(problem_of(load_LE, num_ranks=ranks, num_redundant=redundant))
    return made


@pytest.mark.long
def test_tiny_worlds_come_close_to_the_best_of_all_placements() -> None:
    fresh, mended = [], []
    for problem in tiny_problems(200):
        best = least_peak(problem.load_LE[0], problem.slots_of_ranks.tolist())
        start = with_current(problem, shuffle(problem))
        fresh.append(rank_loads(problem.load_LE, sticky(problem)).max() / best)
        mended.append(rank_loads(problem.load_LE, sticky(start)).max() / best)
    for ratios, mean in ((fresh, 1.01), (mended, 1.02)):
        assert min(ratios) >= 1 - 1e-9
        assert np.mean(ratios) <= mean
        assert max(ratios) <= 4 / 3


@pytest.mark.parametrize("num_redundant", [0, 32, 64])
@pytest.mark.parametrize("kind", list(GENERATED))
def test_from_nothing_it_is_as_balanced_as_the_published_one_and_above_its_hierarchy(
    kind: str, num_redundant: int
) -> None:
    generator = np.random.default_rng(1)
    load_LE = sample(generator, GENERATED[kind](generator)[0], tokens=16384 * 50)
    plain = problem_of(load_LE, num_ranks=RANKS, num_redundant=num_redundant)
    grouped = problem_of(load_LE, num_ranks=RANKS, num_redundant=num_redundant, num_nodes=NODES, num_groups=8)
    theirs = balancedness(plain, deepseek_global(plain))
    hierarchical = balancedness(plain, deepseek(grouped))
    for problem in (plain, grouped):
        ours = sticky(problem)
        assert balancedness(plain, ours) >= theirs - 0.005
        assert balancedness(plain, ours) > hierarchical - 1e-9
        assert ours.num_duplicates() == 0


@dataclass
class Drift:
    """Means over windows: balancedness on steps of the next window, and the share of slots moved (the largest too)."""

    even: float
    uneven: float
    moved: float
    most_moved: float
    crossing: float


def follow(policy: object, popularity_WLE: Floats, num_redundant: int) -> Drift:
    """Plan on each window's load, score 16k-token steps of the next; shares refreshed from its first 24 steps."""
    generator = np.random.default_rng(7)
    current: Placement | None = None
    even, uneven, moved, crossing = [], [], [], []
    for now_LE, next_LE in pairwise(popularity_WLE):
        load_LE = sample(generator, now_LE, tokens=16384 * 50)
        problem = problem_of(load_LE, num_ranks=RANKS, num_redundant=num_redundant, num_nodes=NODES, current=current)
        placement = policy(problem)  # type: ignore[operator]
        if current is not None:
            moved.append(len(moves(current, placement)) / placement.physical_to_logical_LP.size)
            crossing.append(cross_node_moves(current, placement, problem.node_sizes))
        current = placement
        steps = sample(generator, np.repeat(next_LE[None], 6, axis=0), tokens=16384).astype(float)
        first = sample(generator, next_LE, tokens=16384 * 24).astype(float)
        even.append(mean_of_ratios(rank_loads(steps, placement)))
        uneven.append(mean_of_ratios(rank_loads(steps, placement, solve_split(placement, first).anywhere_LP)))
    return Drift(*map(float, (np.mean(even), np.mean(uneven), np.mean(moved), np.max(moved), np.mean(crossing))))


@pytest.mark.parametrize("num_redundant", [32, 64])
def test_under_slow_drift_it_moves_little_and_stays_as_balanced(num_redundant: int) -> None:
    popularity = lognormal(np.random.default_rng(3), 10, LAYERS, EXPERTS, sigma=0.8, rho=0.98)
    ours, theirs = (follow(policy, popularity, num_redundant) for policy in (sticky, deepseek_global))
    assert ours.most_moved <= 0.15
    assert ours.moved <= 0.12
    assert theirs.moved >= 0.9
    assert ours.even >= theirs.even - 0.02
    assert ours.uneven >= theirs.even + 0.02
    assert ours.crossing < theirs.crossing / 10


@pytest.mark.parametrize("num_redundant", [0, 32, 64])
def test_noise_of_three_percent_moves_at_most_a_twentieth(num_redundant: int) -> None:
    popularity = noise(np.random.default_rng(4), 6, LAYERS, EXPERTS)
    assert follow(sticky, popularity, num_redundant).most_moved <= 0.05


def test_a_switch_of_topic_is_mended_with_fewer_moves_than_dealing_anew() -> None:
    popularity = topics(np.random.default_rng(5), 9, LAYERS, EXPERTS, windows_each=3)
    ours, theirs = (follow(policy, popularity, 32) for policy in (sticky, deepseek_global))
    assert ours.even >= theirs.even - 0.02
    assert ours.moved <= theirs.moved / 3


def test_from_the_linear_placement_a_quarter_of_the_moves_bring_the_balance() -> None:
    generator = np.random.default_rng(6)
    load_LE = sample(generator, lognormal(generator, 1, LAYERS, EXPERTS)[0], tokens=16384 * 50)
    start = initial_placement("linear", num_layers=LAYERS, num_experts=EXPERTS, num_ranks=RANKS, num_redundant=32)
    problem = problem_of(load_LE, num_ranks=RANKS, num_redundant=32, current=start)
    placement = sticky(problem)
    assert balancedness(problem, start) < 0.6
    assert balancedness(problem, placement) > 0.96
    assert len(moves(start, placement)) < 0.3 * placement.physical_to_logical_LP.size


def test_a_layer_that_swaps_cannot_mend_is_dealt_anew() -> None:
    generator = np.random.default_rng(8)
    load_LE = sample(generator, zipf(generator, 1, LAYERS, EXPERTS, alpha=1.5)[0], tokens=16384 * 50)
    start = initial_placement("linear", num_layers=LAYERS, num_experts=EXPERTS, num_ranks=RANKS, num_redundant=32)
    problem = problem_of(load_LE, num_ranks=RANKS, num_redundant=32, current=start)
    fresh = problem_of(load_LE, num_ranks=RANKS, num_redundant=32)
    assert balancedness(problem, sticky(problem)) >= balancedness(fresh, sticky(fresh)) - 0.1


def test_experts_of_a_group_gather_on_a_node_where_that_costs_no_balance() -> None:
    generator = np.random.default_rng(9)
    load_LE = sample(generator, lognormal(generator, 1, LAYERS, EXPERTS)[0], tokens=16384 * 50)
    problem = problem_of(load_LE, num_ranks=RANKS, num_redundant=32, num_nodes=NODES, num_groups=8)
    ungrouped = problem_of(load_LE, num_ranks=RANKS, num_redundant=32, num_nodes=NODES)
    assert at_home(problem, sticky(problem)) > 0.6
    assert at_home(problem, sticky(ungrouped)) < 0.5


def at_home(problem: Problem, placement: Placement) -> float:
    """Share of the slots that are on the node that holds most slots of their expert group."""
    group_LP = placement.physical_to_logical_LP // (problem.num_experts // problem.num_groups)
    node_P = problem.node_of_rank[placement.rank_of_slot()]
    home = sum(
        np.bincount(node_P[group_LP[layer] == group], minlength=problem.num_nodes).max()
        for layer in range(problem.num_layers)
        for group in range(problem.num_groups)
    )
    return float(home / placement.physical_to_logical_LP.size)


def test_experts_that_stay_keep_their_slots() -> None:
    popularity = lognormal(np.random.default_rng(10), 2, LAYERS, EXPERTS)
    loads = [sample(np.random.default_rng(11), window, tokens=16384 * 50) for window in popularity]
    first = sticky(problem_of(loads[0], num_ranks=RANKS, num_redundant=32))
    second = sticky(problem_of(loads[1], num_ranks=RANKS, num_redundant=32, current=first))
    changed = np.count_nonzero(first.physical_to_logical_LP != second.physical_to_logical_LP)
    assert changed == len(moves(first, second)) > 0


def test_ragged_ranks_are_balanced_too() -> None:
    generator = np.random.default_rng(12)
    load_LE = sample(generator, lognormal(generator, 1, 4, 60)[0], tokens=16384 * 50)
    problem = problem_of(load_LE, num_ranks=7, num_redundant=9)
    placement = sticky(problem)
    assert balancedness(problem, placement) > 0.98
    shifted = with_current(problem, placement, problem.load_LE[::-1])
    assert balancedness(shifted, sticky(shifted)) > 0.95


def test_a_layer_nobody_used_is_left_alone() -> None:
    load_LE = np.ones((2, 16))
    load_LE[1] = 0
    problem = problem_of(load_LE, num_ranks=4, num_redundant=4)
    placement = sticky(problem)
    assert len(moves(placement, sticky(with_current(problem, placement)))) == 0
