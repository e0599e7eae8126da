"""What each rank looks up, written down rank by rank: the oracle of what is worked out for all ranks in one pass."""

from __future__ import annotations

import numpy as np

from moe_serve.eplb.nodes import nodes_of_ranks
from moe_serve.eplb.placement import Ints
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.search.weights import Split


def shares_from(split: Split, rank: int) -> Floats:
    """float64 (L, P): which part of an expert's tokens from source rank `rank` each slot gets."""
    if not split.prefer_local:
        return split.anywhere_LP
    placement = split.placement
    rank_P, node_R = placement.rank_of_slot(), nodes_of_ranks(split.node_sizes)
    mine_P, near_P = rank_P == rank, node_R[rank_P] == node_R[rank]
    copies_here_LP, copies_near_LP = _copies(split, mine_P), _copies(split, near_P)
    local_LP = np.where(mine_P, 1.0 / np.maximum(copies_here_LP, 1), 0.0)
    near_LP = np.where(near_P, split.on_node_LP, 0.0)
    return np.where(copies_here_LP > 0, local_LP, np.where(copies_near_LP > 0, near_LP, split.anywhere_LP))


def cumulative(split: Split, rank: int) -> tuple[Ints, Floats]:
    """Slots int64 (L, E, C) and cumulative shares (L, E, C); places past the last copy repeat it."""
    slot_LEC = split.placement.logical_to_physical()
    last_LE1 = np.take_along_axis(slot_LEC, split.placement.copies()[:, :, None] - 1, axis=2)
    real_LEC = slot_LEC >= 0
    slot_LEC = np.where(real_LEC, slot_LEC, last_LE1)
    share_LP = shares_from(split, rank)
    share_LEC = np.where(real_LEC, share_LP[np.arange(len(share_LP))[:, None, None], slot_LEC], 0.0)
    total_LEC = np.cumsum(share_LEC, axis=2)
    total_LEC /= total_LEC[:, :, -1:]
    remaining = np.cumsum(share_LEC[:, :, ::-1], axis=2)[:, :, ::-1] - share_LEC
    total_LEC[remaining <= 0] = 1.0
    return slot_LEC, total_LEC


def _copies(split: Split, among_P: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Ints:
    """int64 (L, P): how many copies of each slot's expert are among these slots."""
    table_LP = split.placement.physical_to_logical_LP
    counts = [np.bincount(row[among_P], minlength=split.placement.num_logical)[row] for row in table_LP]
    return np.array(counts, dtype=np.int64).reshape(table_LP.shape)
