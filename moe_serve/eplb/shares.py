"""Tables of shares as they travel: one for each node, and what a rank makes of its node's table. numpy only.

A rank differs from its neighbours only in the experts that it holds itself, and those it can work out alone: so a table
is sent for each node, not for each rank, and in it one number for each copy that there is: padded to the expert with
most copies, tables for thousands of ranks would be ten times as large. Shape letters: L layers, E logical experts, P
physical slots, C most copies of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moe_serve.base.commands import SetShares, StageExperts
from moe_serve.eplb.nodes import node_of_rank
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.search.weights import Split, cumulated

Table = npt.NDArray[np.float32]


def table_of_node(split: Split, node: int) -> Table:
    """float32 (L x P,): cumulative shares of rows from a node, on whose rank no copy is or none is preferred.

    By layer, then expert, then slot.
    """
    return without_gaps(split.cumulative_on_node(node).astype(np.float32), split.placement)


def without_gaps(table_LEC: Table, placement: Placement) -> Table:
    """Of a table only the places of copies that there are, in order."""
    found: Table = table_LEC[placement.logical_to_physical() >= 0]
    return found


def table_of_rank(
    order: StageExperts | SetShares,
    rows: Mapping[int, Sequence[int]],
    placed: Placement,
    rank: int,
    *,
    layers: Sequence[int],
) -> Table:
    """float32 (L, E, C) for source rank `rank`, of the layers in `rows` (their physical_to_logical), in order.

    `layers` that the order is about, ascending; all of `rows` are among them. `placed` any placement of this world:
    ranks own the same slots in all of them.
    """
    node = node_of_rank(order.node_sizes, rank)
    own = [layer in rows for layer in layers]
    rows_LP = np.array([rows[layer] for layer in sorted(rows)], dtype=np.int64).reshape(len(rows), placed.num_physical)
    placement = Placement(rows_LP, placed.offsets, placed.num_logical)
    there_LEC = placement.logical_to_physical() >= 0
    table_LEC = np.ones(there_LEC.shape, dtype=np.float32)
    # One number for each copy: as many for each layer as it has slots.
    told_LP = np.frombuffer(order.shares[node], dtype=np.float32).reshape(len(layers), placed.num_physical)
    table_LEC[there_LEC] = told_LP[own].ravel()
    if order.local_first:
        _own_copies_first(table_LEC, placement, rank)
    return table_LEC


def _own_copies_first(table_LEC: Table, placement: Placement, rank: int) -> None:
    """Rows of the rank whose expert it holds are split evenly over its own copies."""
    mine = placement.slots_of(rank)
    held_LS = placement.physical_to_logical_LP[:, mine.start : mine.stop]
    layer_N, expert_N = np.unique(
        np.stack([np.repeat(np.arange(len(held_LS)), held_LS.shape[1]), held_LS.ravel()]), axis=1
    )
    slot_NC = placement.logical_to_physical()[layer_N, expert_N]
    here_NC = (slot_NC >= mine.start) & (slot_NC < mine.stop)
    own_NC = cumulated(here_NC / here_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    table_LEC[layer_N, expert_N] = own_NC
