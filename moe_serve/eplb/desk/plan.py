"""Asking a policy by name for a placement, what the answer is worth, and in which order to make its moves."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import numpy as np

from moe_serve.base.tables import EPLB_POLICIES
from moe_serve.eplb.nodes import NodeSizes, nodes_of_ranks
from moe_serve.eplb.placement import Ints, Moves, Placement, keep_slots, moves
from moe_serve.eplb.policies.base import Floats, Policy, Problem
from moe_serve.eplb.search.scores import layer_balancedness, peaks, rank_loads


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy's answer beside the placement it would replace."""

    policy: str
    before: Placement
    after: Placement
    load_LE: Floats
    node_sizes: NodeSizes
    solve_seconds: float

    @property
    def moves(self) -> Moves:
        return moves(self.before, self.after)

    def report(self) -> dict[str, object]:
        """The figures of a plan; balancedness is the mean over layers of mean / max rank load, even split."""
        before_L, after_L = (
            layer_balancedness(rank_loads(self.load_LE, placement)) for placement in (self.before, self.after)
        )
        made = self.moves
        return {
            "policy": self.policy,
            "solve_seconds": self.solve_seconds,
            "balancedness_before": float(before_L.mean()),
            "balancedness_after": float(after_L.mean()),
            "balancedness_min_layer": float(after_L.min()),
            "moved_experts": len(made),
            "moved_share": len(made) / self.after.physical_to_logical_LP.size,
            "cross_node_moves": cross_node_moves(self.before, self.after, self.node_sizes),
            "duplicate_slots": self.after.num_duplicates(),
        }


def make_plan(problem: Problem, policy: str) -> Plan:
    """Ask the policy of this name; ConfigError for an unknown name or a problem it cannot solve."""
    solve = cast(Policy, EPLB_POLICIES.load(policy))
    started = time.perf_counter()
    after = solve(problem)
    seconds = time.perf_counter() - started
    before = problem.start()
    after.check()
    return Plan(policy, before, keep_slots(before, after), problem.load_LE, problem.node_sizes, seconds)


def cross_node_moves(before: Placement, after: Placement, node_sizes: NodeSizes) -> int:
    """Moved slots whose expert no rank of their node held before: these must come over the network between nodes."""
    made = moves(before, after)
    node_R = nodes_of_ranks(node_sizes)

    def cells(layer: Ints, rank: Ints, expert: Ints) -> Ints:
        return (layer * len(node_sizes) + node_R[rank]) * after.num_logical + expert

    layers = np.arange(before.num_layers)[:, None]
    held = cells(layers, before.rank_of_slot(), before.physical_to_logical_LP)
    wanted = cells(made.layer, after.rank_of_slot()[made.slot], made.expert)
    return int(np.count_nonzero(~np.isin(wanted, held)))


def layers_by_gain(before: Placement, after: Placement, load_LE: Floats) -> list[int]:
    """The layers that change, those first whose largest rank load falls most per slot moved."""
    moved_L = np.bincount(moves(before, after).layer, minlength=after.num_layers)
    changed_L = (before.physical_to_logical_LP != after.physical_to_logical_LP).any(axis=1)
    mean_L = load_LE.mean(axis=1)
    fall_L = (peaks(rank_loads(load_LE, before)) - peaks(rank_loads(load_LE, after))) * mean_L
    gain_L = fall_L / np.maximum(moved_L, 0.5)
    order = np.argsort(-gain_L, kind="stable")
    return [int(layer) for layer in order if changed_L[layer]]
