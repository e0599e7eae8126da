"""How an expert's tokens are split over its copies: uneven shares, so that rank loads even out without moving weights.

With `prefer_local` a copy on the token's own rank is taken first, then one on its node; the shares of the rest are
solved given that. L layers, E experts, P slots, R ranks, N nodes, C most copies of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.nodes import NodeSizes, nodes_of_ranks
from moe_serve.eplb.placement import Ints, Placement
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.search.scores import sum_by_rank

SWEEPS = 10
LEAST_RELIEF = 1e-9  # of a peak: less is rounding, and must not choose between sweeps
POWER = 3.0  # of mean / rank load in a sweep; more swings to and fro


@dataclass(frozen=True, slots=True)
class Split:
    """Shares of the copies of each expert, float64 (L, P) each.

    `anywhere_LP`: for tokens that have no copy on their node (or whenever locality is not preferred); sums to 1 over
    the slots of an expert. `on_node_LP`: for tokens with a copy on their node, but not on their rank; sums to 1
    over the slots of an expert on one node.
    """

    placement: Placement
    node_sizes: NodeSizes
    prefer_local: bool
    anywhere_LP: Floats
    on_node_LP: Floats

    def cumulative_on_node(self, node: int) -> Floats:
        """float64 (L, E, C): what a token from a node looks up, if its rank has no copy or none is preferred.

        A token with hash h in [0, 1) takes the first copy, by slot, whose cumulative share is above h. Shares end at 1;
        places beyond the last copy too, and copies that get nothing repeat the share before them.
        """
        slot_LEC = self.placement.logical_to_physical()
        share_LP = self._shares_on_node(node)
        share_LEC = np.where(slot_LEC >= 0, share_LP[np.arange(len(share_LP))[:, None, None], slot_LEC], 0.0)
        return cumulated(share_LEC)

    def _shares_on_node(self, node: int) -> Floats:
        if not self.prefer_local:
            return self.anywhere_LP
        where = _Where(self.placement, self.node_sizes)
        on_node_LE = where.on_node_LNE[:, node]
        near_LP = np.where(where.node_P == node, self.on_node_LP, 0.0)
        copies_near_LP = np.take_along_axis(on_node_LE, self.placement.physical_to_logical_LP, axis=1)
        return np.where(copies_near_LP > 0, near_LP, self.anywhere_LP)


def cumulated(share_XC: Floats) -> Floats:
    """Cumulative shares; rounding must leave no hash without a copy, nor give one to a copy without a share."""
    total_XC = np.cumsum(share_XC, axis=-1)
    total_XC /= total_XC[..., -1:]
    remaining_XC = np.cumsum(share_XC[..., ::-1], axis=-1)[..., ::-1] - share_XC
    total_XC[remaining_XC <= 0] = 1.0
    return total_XC


def even_split(placement: Placement, *, node_sizes: NodeSizes = (), prefer_local: bool = False) -> Split:
    """Equal shares: where to begin, and what holds until load was seen."""
    where = _Where(placement, node_sizes)
    anywhere_LP, on_node_LP = np.ones((2, *placement.physical_to_logical_LP.shape))
    return Split(placement, where.node_sizes, prefer_local, where.per_expert(anywhere_LP), where.per_node(on_node_LP))


def solve_split(
    placement: Placement, load: Floats, *, node_sizes: NodeSizes = (), prefer_local: bool = False, sweeps: int = SWEEPS
) -> Split:
    """Shares under which rank loads even out, by multiplicative sweeps from an even start; of these the best.

    `load` is float64 (L, E), then every rank sends the same part, or (R, L, E) by source rank.
    """
    split = even_split(placement, node_sizes=node_sizes, prefer_local=prefer_local)
    where = _Where(placement, node_sizes)
    fixed_LP, near_LP, far_LP = _pools(where, load, prefer_local)
    anywhere_LP, on_node_LP = split.anywhere_LP, split.on_node_LP
    by_source_XLE = load.reshape(-1, placement.num_layers, placement.num_logical)
    mean_L1 = by_source_XLE.sum(axis=(0, 2))[:, None] / placement.num_ranks
    best = anywhere_LP.copy(), on_node_LP.copy()
    best_peak_L = np.full(placement.num_layers, np.inf)
    for sweep in range(sweeps + 1 if placement.num_redundant else 0):
        rank_LR = sum_by_rank(fixed_LP + on_node_LP * near_LP + anywhere_LP * far_LP, placement.offsets)
        better = rank_LR.max(axis=1) < best_peak_L * (1 - LEAST_RELIEF)
        best_peak_L[better] = rank_LR.max(axis=1)[better]
        best[0][better], best[1][better] = anywhere_LP[better], on_node_LP[better]
        if sweep == sweeps:
            break
        relief_LR = (mean_L1 / np.maximum(rank_LR, 1e-9 * mean_L1 + 1e-300)) ** POWER
        relief_LP = np.clip(relief_LR, 0.1, 10.0)[:, where.rank_P]
        anywhere_LP = where.per_expert(anywhere_LP * relief_LP)
        if prefer_local:
            on_node_LP = where.per_node(on_node_LP * relief_LP)
    return Split(placement, where.node_sizes, prefer_local, *best)


def split_loads(split: Split, load: Floats) -> Floats:
    """float64 (L, P): tokens of each slot when `load`, (L, E) or (R, L, E) by source rank, is split so."""
    where = _Where(split.placement, split.node_sizes)
    fixed_LP, near_LP, far_LP = _pools(where, load, split.prefer_local)
    return fixed_LP + split.on_node_LP * near_LP + split.anywhere_LP * far_LP


def _is_by_source(placement: Placement, load: Floats) -> bool:
    """Whether the sources of tokens are known; without that they come evenly from all ranks."""
    ranks, layers, experts = placement.num_ranks, placement.num_layers, placement.num_logical
    if load.shape not in ((layers, experts), (ranks, layers, experts)):
        raise ConfigError(
            f"the load must have the shape [{layers}, {experts}] (layers, experts) or [{ranks}, {layers}, {experts}] "
            f"(source ranks first), not {list(load.shape)}"
        )
    return load.ndim == 3


class _Where:
    """Where the copies are: counts by rank and node, and sums over the copies of an expert."""

    def __init__(self, placement: Placement, node_sizes: NodeSizes) -> None:
        self.placement = placement
        self.node_sizes = node_sizes or (placement.num_ranks,)
        self.num_nodes = num_nodes = len(self.node_sizes)
        self.node_R = nodes_of_ranks(self.node_sizes)
        self.rank_P = placement.rank_of_slot()
        self.node_P = self.node_R[self.rank_P]
        layers, experts = placement.num_layers, placement.num_logical
        table_LP = placement.physical_to_logical_LP
        row = np.arange(layers)[:, None]
        self.expert_cell_LP = row * experts + table_LP
        self.node_cell_LP = (row * num_nodes + self.node_P) * experts + table_LP
        self.on_node_LNE = self._count(self.node_cell_LP, (layers, num_nodes, experts))

    @property
    def on_rank_LRE(self) -> Ints:
        """int64 (L, R, E): copies of each expert on each rank."""
        p = self.placement
        return self._count(p.holdings(), (p.num_layers, p.num_ranks, p.num_logical))

    @staticmethod
    def _count(cells: Ints, shape: tuple[int, ...]) -> Ints:
        return np.bincount(cells.ravel(), minlength=int(np.prod(shape))).reshape(shape).astype(np.int64)

    def per_expert(self, values_LP: Floats) -> Floats:
        """Normalised to sum 1 over the copies of each expert."""
        return _normalise(values_LP, self.expert_cell_LP)

    def per_node(self, values_LP: Floats) -> Floats:
        """Normalised to sum 1 over the copies of each expert on each node."""
        return _normalise(values_LP, self.node_cell_LP)


def _normalise(values_LP: Floats, cell_LP: Ints) -> Floats:
    sums = np.bincount(cell_LP.ravel(), weights=values_LP.ravel())
    normalised: Floats = values_LP / sums[cell_LP]
    return normalised


def _pools(where: _Where, load: Floats, prefer_local: bool) -> tuple[Floats, Floats, Floats]:
    """Tokens that each slot (L, P) must take, may share with copies on its node, and with copies anywhere."""
    by_source = _is_by_source(where.placement, load)
    if prefer_local:
        return _pools_by_source(where, load) if by_source else _pools_of_even_sources(where, load)
    table_LP = where.placement.physical_to_logical_LP
    far_LE: Floats = load.sum(axis=0) if by_source else load
    return np.zeros(table_LP.shape), np.zeros(table_LP.shape), np.take_along_axis(far_LE, table_LP, axis=1)


def _pools_by_source(where: _Where, load_RLE: Floats) -> tuple[Floats, Floats, Floats]:
    table_LP = where.placement.physical_to_logical_LP
    row = np.arange(len(table_LP))[:, None]
    local_LRE = where.on_rank_LRE
    copies_here_LP = local_LRE[row, where.rank_P, table_LP]
    fixed_LP = load_RLE[where.rank_P, row, table_LP] / copies_here_LP
    without_RLE = np.where(local_LRE.transpose(1, 0, 2) > 0, 0.0, load_RLE)
    starts = np.flatnonzero(np.diff(where.node_R, prepend=-1))
    by_node_NLE = np.add.reduceat(without_RLE, starts, axis=0)
    served_NLE = where.on_node_LNE.transpose(1, 0, 2) > 0
    near_LP = by_node_NLE[where.node_P, row, table_LP]
    far_LE = np.where(served_NLE, 0.0, by_node_NLE).sum(axis=0)
    return fixed_LP, near_LP, far_LE[row, table_LP]


def _pools_of_even_sources(where: _Where, load_LE: Floats) -> tuple[Floats, Floats, Floats]:
    """The same without an axis for the ranks: on a node, those that hold an expert are counted, the others alike."""
    placement = where.placement
    table_LP = placement.physical_to_logical_LP
    layers, experts = placement.num_layers, placement.num_logical
    row = np.arange(layers)[:, None]
    each_LE = load_LE / placement.num_ranks
    held, place, copies = np.unique(placement.holdings(), return_inverse=True, return_counts=True)
    fixed_LP = each_LE[row, table_LP] / copies[place.reshape(table_LP.shape)]
    layer, rank, expert = held // (placement.num_ranks * experts), held // experts % placement.num_ranks, held % experts
    cells = (layer * where.num_nodes + where.node_R[rank]) * experts + expert
    holders_LNE = np.bincount(cells, minlength=layers * where.num_nodes * experts).reshape(layers, -1, experts)
    without_LNE = np.bincount(where.node_R, minlength=where.num_nodes)[:, None] - holders_LNE
    near_LP = each_LE[row, table_LP] * without_LNE[row, where.node_P, table_LP]
    far_LE = each_LE * np.where(holders_LNE > 0, 0, without_LNE).sum(axis=1)
    return fixed_LP, near_LP, far_LE[row, table_LP]
