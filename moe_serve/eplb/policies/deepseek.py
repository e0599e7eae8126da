"""The published algorithm (github.com/deepseek-ai/EPLB): the baseline everybody knows, hierarchical or global.

It looks at loads only: not at where experts are now, nor at copies that meet on a rank. Computed in float32, ties to
the lower index, as published. Ranks with unequal numbers of slots are our addition.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.placement import Ints, Placement
from moe_serve.eplb.policies.base import Problem
from moe_serve.eplb.search.packing import pack

Singles = npt.NDArray[np.float32]


def deepseek(problem: Problem) -> Placement:
    """Hierarchical when the groups divide over the nodes, else global."""
    if problem.num_groups % problem.num_nodes:
        return _rebalance(problem, groups=1, nodes=1)
    if problem.num_nodes > 1:
        _check_even(problem)
    return _rebalance(problem, groups=problem.num_groups, nodes=problem.num_nodes)


def deepseek_global(problem: Problem) -> Placement:
    """Without groups and nodes, whatever the problem says: the better balanced form."""
    return _rebalance(problem, groups=1, nodes=1)


def _check_even(problem: Problem) -> None:
    slots, ranks, nodes = problem.num_physical, problem.num_ranks, problem.num_nodes
    if len(set(problem.node_sizes)) > 1:
        sizes = ", ".join(map(str, problem.node_sizes))
        raise ConfigError(f"policy deepseek needs equally many ranks on every node, not {sizes}")
    if slots % ranks or len(set(problem.slots_of_ranks.tolist())) > 1:
        fitting = -problem.num_experts % ranks
        raise ConfigError(
            f"policy deepseek on {nodes} nodes needs equally many slots on all {ranks} ranks, not {slots} in all; "
            f"{fitting} redundant experts would fit, or {fitting + ranks}"
        )


def _rebalance(problem: Problem, *, groups: int, nodes: int) -> Placement:
    load_LE = problem.load_LE.astype(np.float32)
    layers, experts = load_LE.shape
    size, per_node = experts // groups, experts // nodes
    # 1: groups to nodes. `own` numbers the experts so that those of a node are neighbours.
    node_LG, nth_LG = pack(load_LE.reshape(layers, groups, size).sum(axis=-1), np.full(nodes, groups // nodes))
    first_LG = (node_LG * (groups // nodes) + nth_LG) * size
    own_LE = (first_LG[:, :, None] + np.arange(size)).reshape(layers, experts)
    expert_of_own_LE = np.argsort(own_LE, axis=1)
    # 2: copies within each node. X = layers x nodes.
    load_Xe = np.take_along_axis(load_LE, expert_of_own_LE, axis=1).reshape(layers * nodes, per_node)
    slots_per_node = problem.num_physical // nodes
    own_Xp, copies_Xe = replicate(load_Xe, slots_per_node)
    # 3: copies to the ranks of their node.
    ranks = problem.num_ranks // nodes
    places = problem.slots_of_ranks[:ranks]
    rank_Xp, place_Xp = pack(np.take_along_axis(load_Xe / copies_Xe, own_Xp, axis=1), places)
    slot_Xp = np.array(problem.offsets)[rank_Xp] + place_Xp
    placed_Xp = np.empty_like(own_Xp)
    np.put_along_axis(placed_Xp, slot_Xp, own_Xp, axis=1)
    placed_Lnp = placed_Xp.reshape(layers, nodes, slots_per_node) + np.arange(nodes)[:, None] * per_node
    table_LP = np.take_along_axis(expert_of_own_LE, placed_Lnp.reshape(layers, -1), axis=1)
    return Placement(table_LP, problem.offsets, experts)


def replicate(load_Xe: Singles, slots: int) -> tuple[Ints, Singles]:
    """Extra copies to the largest share: expert of each slot int64 (X, slots), copies of each expert float32 (X, e)."""
    rows, experts = load_Xe.shape
    row = np.arange(rows)
    expert_Xp = np.tile(np.arange(slots, dtype=np.int64), (rows, 1))
    copies_Xe = np.ones_like(load_Xe)
    for slot in range(experts, slots):
        busiest = (load_Xe / copies_Xe).argmax(axis=1)
        expert_Xp[:, slot] = busiest
        copies_Xe[row, busiest] += 1
    return expert_Xp, copies_Xe
