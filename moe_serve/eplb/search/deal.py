"""Dealing copies to ranks from nothing: heaviest first, each to the lightest rank without a copy of its expert."""

from __future__ import annotations

import numpy as np

from moe_serve.eplb.placement import Ints
from moe_serve.eplb.policies.base import Floats, Problem

FULL, HOLDS_IT = np.inf, 1e30
SAME_NODE = 0.02  # of the mean rank load: copies of an expert go to different nodes unless that costs more than this
MANY = 3e7  # above this much work, copies are dealt several at a time


def deal(problem: Problem, load_LE: Floats, copies_LE: Ints, home_LE: Ints | None, away: float) -> Ints:
    """int64 (L, P): the expert of each slot.

    `home_LE`, if given, is the node each expert should be on; another node looks heavier by `away` of the copy's load.
    Two copies may still meet on a rank when no other has a free place: the caller repairs that.
    """
    expert_LP, weight_LP = _heaviest_first(load_LE / copies_LE, copies_LE)
    layers, ranks = len(load_LE), problem.num_ranks
    cell_L1 = np.arange(layers)[:, None] * ranks  # ranks of all layers in one row
    places = np.tile(problem.slots_of_ranks, layers)
    load = np.where(places > 0, 0.0, FULL)
    avoid_LR = np.zeros((layers, ranks))
    again_LP = np.zeros(expert_LP.shape, dtype=np.bool_)
    again_LP[:, 1:] = expert_LP[:, 1:] == expert_LP[:, :-1]
    any_again = np.append(again_LP.any(axis=0), False)
    rank_LP = np.empty_like(expert_LP)
    bias = _Bias(problem, load_LE, home_LE, away)
    end = 0
    while end < problem.num_physical:
        begin, end = end, _batch(load.reshape(layers, ranks), problem.num_physical, end)
        seen_LR = load.reshape(layers, ranks)
        if any_again[begin]:
            avoid_LR *= again_LP[:, begin, None]
            seen_LR = seen_LR + avoid_LR
        if home_LE is not None:
            seen_LR = seen_LR + bias.away_from_home(expert_LP[:, begin], weight_LP[:, begin])
        rank_Lb = seen_LR.argmin(axis=1)[:, None] if end == begin + 1 else seen_LR.argsort(axis=1)[:, : end - begin]
        rank_LP[:, begin:end] = rank_Lb
        cells = rank_Lb + cell_L1
        places[cells] -= 1
        load[cells] += np.where(places[cells] > 0, weight_LP[:, begin:end], FULL)
        if any_again[end]:
            if not any_again[begin]:
                avoid_LR[:] = 0.0
            bias.add_same_node(avoid_LR, rank_Lb[:, -1])
            avoid_LR.reshape(-1)[cells[:, -1]] = HOLDS_IT
    return _to_slots(expert_LP, rank_LP)


class _Bias:
    """What makes a rank look heavier than it is."""

    def __init__(self, problem: Problem, load_LE: Floats, home_LE: Ints | None, away: float) -> None:
        self.home_LE, self.away, self.node_R = home_LE, away, problem.node_of_rank
        self.row = np.arange(len(load_LE))
        self.spread_L1 = SAME_NODE * load_LE.sum(axis=1, keepdims=True) / problem.num_ranks
        spreads = problem.num_nodes > 1 and home_LE is None
        self.together_RR = (self.node_R[:, None] == self.node_R).astype(np.float64) if spreads else None

    def away_from_home(self, expert_L: Ints, weight_L: Floats) -> Floats:
        """float64 (L, R): for ranks on another node than the expert's."""
        assert self.home_LE is not None
        elsewhere_LR = self.node_R != self.home_LE[self.row, expert_L][:, None]
        bias: Floats = elsewhere_LR * (self.away * weight_L)[:, None]
        return bias

    def add_same_node(self, avoid_LR: Floats, rank_L: Ints) -> None:
        """For ranks on the node that just got a copy."""
        if self.together_RR is not None:
            avoid_LR += self.together_RR[rank_L] * self.spread_L1


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


def _to_slots(expert_LP: Ints, rank_LP: Ints) -> Ints:
    """int64 (L, P): each rank's experts in its slots, in the order in which they were dealt."""
    order_LP = rank_LP.argsort(axis=1, kind="stable")
    return np.take_along_axis(expert_LP, order_LP, axis=1)
