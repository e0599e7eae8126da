"""Dealing copies to ranks from nothing: heaviest first, each to the lightest rank without a copy of its expert."""

from __future__ import annotations

import numpy as np

from moe_serve.base.placement import Ints
from moe_serve.control.eplb.base import Floats, Problem

FULL, HOLDS_IT = np.inf, 1e30
SAME_NODE = 0.02  # of the mean rank load: copies of an expert go to different nodes unless that costs more than this
MANY = 3e7  # above this much work, copies are dealt several at a time


def deal(problem: Problem, load_LE: Floats, copies_LE: Ints, home_LE: Ints | None, away: float) -> Ints:
    """int64 (L, P): the expert of each slot.

    `home_LE`, if given, is the node each expert should be on; another node looks heavier by `away` of the copy's load.
    Two copies may still meet on a rank when no other has a free place: the caller repairs that.
    """
    weight_LE = load_LE / copies_LE
    expert_LP, weight_LP = _heaviest_first(weight_LE, copies_LE)
    layers, ranks = len(load_LE), problem.num_ranks
    row = np.arange(layers)[:, None]
    places_R, node_R = problem.slots_of_ranks, problem.node_of_rank
    load_LR = np.where(places_R > 0, np.zeros((layers, ranks)), FULL)
    used_LR = np.zeros((layers, ranks), dtype=np.int64)
    avoid_LR = np.zeros((layers, ranks))
    spread_L1 = SAME_NODE * load_LE.sum(axis=1, keepdims=True) / ranks
    together_RR = node_R[:, None] == node_R if problem.num_nodes > 1 and home_LE is None else None
    table_LP = np.empty((layers, problem.num_physical), dtype=np.int64)
    start_R = np.array(problem.offsets[:-1])
    last_L1 = np.full((layers, 1), -1)
    end = 0
    while end < problem.num_physical:
        begin, end = end, _batch(load_LR, problem.num_physical, end)
        expert_Lb, weight_Lb = expert_LP[:, begin:end], weight_LP[:, begin:end]
        avoid_LR *= expert_Lb[:, :1] == last_L1
        seen_LR = load_LR + avoid_LR
        if home_LE is not None:
            home_L1 = np.take_along_axis(home_LE, expert_Lb[:, :1], axis=1)
            seen_LR += (node_R != home_L1) * (away * weight_Lb[:, :1])
        rank_Lb = seen_LR.argmin(axis=1)[:, None] if end == begin + 1 else seen_LR.argsort(axis=1)[:, : end - begin]
        place_Lb = used_LR[row, rank_Lb]
        table_LP[row, start_R[rank_Lb] + place_Lb] = expert_Lb
        used_LR[row, rank_Lb] = place_Lb + 1
        load_LR[row, rank_Lb] = np.where(place_Lb + 1 < places_R[rank_Lb], load_LR[row, rank_Lb] + weight_Lb, FULL)
        if together_RR is not None:
            avoid_LR += together_RR[rank_Lb[:, -1]] * spread_L1
        avoid_LR[row, rank_Lb[:, -1:]] = HOLDS_IT
        last_L1 = expert_Lb[:, -1:]
    return table_LP


def _heaviest_first(weight_LE: Floats, copies_LE: Ints) -> tuple[Ints, Floats]:
    """All copies, heaviest first, those of one expert together: expert and load, (L, P) each."""
    order_LE = np.argsort(-weight_LE, axis=1, kind="stable")
    repeats = np.take_along_axis(copies_LE, order_LE, axis=1).ravel()
    expert_LP = np.repeat(order_LE.ravel(), repeats).reshape(len(weight_LE), -1)
    return expert_LP, np.take_along_axis(weight_LE, expert_LP, axis=1)


def _batch(load_LR: Floats, slots: int, begin: int) -> int:
    """End of the next batch: one copy where that is quick, else as many as a sixteenth of the ranks, one for each."""
    ranks = load_LR.shape[1]
    if load_LR.size * slots <= MANY or ranks < 32:
        return begin + 1
    with_place = int(np.isfinite(load_LR).sum(axis=1).min())
    return int(min(slots, begin + max(1, min(ranks // 16, with_place))))
