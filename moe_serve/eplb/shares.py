"""Tables of shares as they travel: one for each node, and what a rank makes of its node's table. numpy only.

A rank differs from its neighbours only in the experts that it holds itself, and those it can work out alone: so a table
is sent for each node, not for each rank. Shape letters: L layers, E logical experts, C most copies of one expert.
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


def table_of_node(split: Split, node: int, layers: Sequence[int]) -> Table:
    """float32 (layers, E, C): cumulative shares of rows from a node, on whose rank no copy is or none is preferred."""
    return split.cumulative_on_node(node)[layers].astype(np.float32)


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
    whole_LEC = np.frombuffer(order.shares[node], dtype=np.float32).reshape(len(layers), placed.num_logical, -1)
    table_LEC = whole_LEC[[layer in rows for layer in layers]]
    if order.local_first and rows:
        rows_LP = np.array([rows[layer] for layer in sorted(rows)], dtype=np.int64)
        placement = Placement(rows_LP, placed.offsets, placed.num_logical)
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
    table_LEC[layer_N, expert_N] = _as_wide(own_NC, table_LEC.shape[2])


def _as_wide(own_NC: Table, most: int) -> Table:
    """The table may have places beyond the copies of these layers."""
    wide = np.ones((len(own_NC), most), dtype=np.float32)
    wide[:, : own_NC.shape[1]] = own_NC
    return wide
