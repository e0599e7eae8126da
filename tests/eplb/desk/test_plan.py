"""Plans: their figures, and the order and size of their steps."""

from __future__ import annotations

import numpy as np
import pytest

from bench.traces import lognormal, sample
from moe_serve.base.errors import ConfigError
from moe_serve.eplb.desk.plan import cross_node_moves, layers_by_gain, make_plan
from moe_serve.eplb.placement import Placement, moves
from moe_serve.eplb.policies.base import problem_of
from moe_serve.eplb.search.scores import peaks, rank_loads


def test_a_report_counts_what_changed() -> None:
    current = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), (0, 2, 4), 4)
    problem = problem_of(np.array([[4, 4, 1, 1], [1, 1, 1, 1]]), num_ranks=2, current=current)
    plan = make_plan(problem, "sticky")
    report = plan.report()
    assert list(report) == [
        "policy",
        "solve_seconds",
        "balancedness_before",
        "balancedness_after",
        "balancedness_min_layer",
        "moved_experts",
        "moved_share",
        "cross_node_moves",
        "duplicate_slots",
    ]
    assert report["balancedness_before"] == pytest.approx((5 / 8 + 1) / 2)
    assert report["balancedness_after"] == report["balancedness_min_layer"] == 1
    assert (report["moved_experts"], report["moved_share"]) == (2, 0.25)
    assert (report["cross_node_moves"], report["duplicate_slots"]) == (0, 0)


def test_an_unknown_policy_is_refused_with_those_known() -> None:
    with pytest.raises(ConfigError, match="unknown EPLB policy 'best'; known are: sticky, deepseek, static, shuffle"):
        make_plan(problem_of(np.ones((1, 4)), num_ranks=2), "best")


def test_a_move_crosses_nodes_if_no_rank_of_the_node_held_the_expert() -> None:
    old = Placement(np.array([[0, 1, 2, 3]]), (0, 1, 2, 3, 4), 4)
    new = Placement(np.array([[1, 0, 0, 3]]), (0, 1, 2, 3, 4), 4)
    assert len(moves(old, new)) == 3
    assert cross_node_moves(old, new, (2, 2)) == 1
    assert cross_node_moves(old, new, (4,)) == 0
    assert cross_node_moves(old, new, (1, 1, 1, 1)) == 3


def test_layers_come_in_the_order_of_gain_per_move_in_chunks_of_bounded_size() -> None:
    generator = np.random.default_rng(0)
    loads = [sample(generator, window, tokens=16384) for window in lognormal(generator, 2, 12, 64, rho=0.9)]
    before = make_plan(problem_of(loads[0], num_ranks=8, num_redundant=8), "sticky").after
    plan = make_plan(problem_of(loads[1], num_ranks=8, num_redundant=8, current=before), "sticky")
    order = layers_by_gain(before, plan.after, plan.load_LE)
    changed = (before.physical_to_logical_LP != plan.after.physical_to_logical_LP).any(axis=1)
    assert sorted(order) == np.flatnonzero(changed).tolist()
    moved = np.bincount(moves(before, plan.after).layer, minlength=12)
    saved = peaks(rank_loads(plan.load_LE, before)) - peaks(rank_loads(plan.load_LE, plan.after))
    gains = [saved[layer] * plan.load_LE[layer].mean() / moved[layer] for layer in order]
    assert gains == sorted(gains, reverse=True)
