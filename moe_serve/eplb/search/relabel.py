"""Giving freshly dealt ranks the numbers under which most of their experts are already in place."""

from __future__ import annotations

import numpy as np

from moe_serve.eplb.placement import Ints
from moe_serve.eplb.policies.base import Problem


def relabel_ranks(held_P: Ints, dealt_P: Ints, problem: Problem) -> Ints:
    """`dealt_P` (one layer) with whole ranks exchanged, greedily by the number of experts that then stay.

    Only ranks with equally many slots are exchanged, and with groups and nodes only ranks of one node.
    """
    offsets = np.array(problem.offsets)
    rank_P = np.repeat(np.arange(problem.num_ranks), problem.slots_of_ranks)
    kind_R = problem.slots_of_ranks * problem.num_nodes
    if problem.num_groups > 1:
        kind_R = kind_R + problem.node_of_rank
    new_rank, old_rank, shared = _shared_experts(held_P, dealt_P, rank_P, problem)
    target_R = np.full(problem.num_ranks, -1)
    taken_R = np.zeros(problem.num_ranks, dtype=np.bool_)
    for at in np.argsort(-shared, kind="stable"):
        new, old = new_rank[at], old_rank[at]
        if target_R[new] < 0 and not taken_R[old] and kind_R[new] == kind_R[old]:
            target_R[new], taken_R[old] = old, True
    for kind in np.unique(kind_R):
        rest = np.flatnonzero((kind_R == kind) & (target_R < 0))
        target_R[rest] = np.flatnonzero((kind_R == kind) & ~taken_R)
    result_P = np.empty_like(dealt_P)
    result_P[offsets[target_R[rank_P]] + np.arange(len(rank_P)) - offsets[rank_P]] = dealt_P
    return result_P


def _shared_experts(held_P: Ints, dealt_P: Ints, rank_P: Ints, problem: Problem) -> tuple[Ints, Ints, Ints]:
    """(dealt rank, holding rank, number of experts on both) of all pairs of ranks that share any."""
    order = np.argsort(held_P, kind="stable")
    start = np.searchsorted(held_P[order], dealt_P, side="left")
    count = np.searchsorted(held_P[order], dealt_P, side="right") - start
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    holders = rank_P[order[np.repeat(start, count) + nth]]
    pair, shared = np.unique(np.repeat(rank_P, count) * problem.num_ranks + holders, return_counts=True)
    new_rank, old_rank = np.divmod(pair, problem.num_ranks)
    return new_rank, old_rank, shared.astype(np.int64)
