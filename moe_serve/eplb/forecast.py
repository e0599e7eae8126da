"""What a placement would bring under a load, and how the load is split over copies: pure, without any state.

Shape letters: L layers, E logical experts, R expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.nodes import NodeSizes
from moe_serve.eplb.placement import Placement, moves
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.rearrangement import Proposal, chunks_of
from moe_serve.eplb.search.scores import mean_of_ratios, ratio_of_sums, sum_by_rank
from moe_serve.eplb.search.weights import Split, solve_split, split_loads


@dataclass(frozen=True, slots=True)
class Forecast:
    """`expert_bytes` of one expert's weights in one layer; copies on the token's rank or node first, or not."""

    node_sizes: NodeSizes
    prefer_local: bool
    expert_bytes: int

    @property
    def num_nodes(self) -> int:
        return max(1, len(self.node_sizes))

    def plan(self, load_LE: Floats, served: Placement, wanted: Placement, *, epoch: int = 0) -> Proposal:
        """From the placement served since `epoch` to another; ConfigError if that is of another model or world."""
        check_alike(served, wanted)
        before, after = self.rank_loads(load_LE, served), self.rank_loads(load_LE, wanted)
        moves_of_layers = np.bincount(moves(served, wanted).layer, minlength=served.num_layers).tolist()
        return Proposal(
            epoch=epoch,
            placement=wanted,
            balancedness_before=mean_of_ratios(before),
            balancedness_after=mean_of_ratios(after),
            gain=1.0 - ratio_of_sums(before) / ratio_of_sums(after),
            moves_of_layers=moves_of_layers,
            num_bytes=sum(moves_of_layers) * self.expert_bytes,
            chunks=chunks_of(served, wanted, load_LE, self.expert_bytes),
        )

    def split(self, load_LE: Floats, placement: Placement) -> Split:
        """The shares of copies that even the ranks out."""
        return solve_split(placement, load_LE, node_sizes=self.node_sizes, prefer_local=self.prefer_local)

    def rank_loads(self, load_LE: Floats, placement: Placement) -> Floats:
        """float64 (L, R): rows each rank computes, split so."""
        return sum_by_rank(split_loads(self.split(load_LE, placement), load_LE), placement.offsets)


def check_alike(served: Placement, other: Placement) -> None:
    """ConfigError with the sizes of both unless they are of one model and world."""
    sizes = [(p.num_layers, p.num_logical, p.num_physical, p.num_ranks) for p in (other, served)]
    if sizes[0] != sizes[1] or served.offsets != other.offsets:
        theirs, ours = (
            f"{layers} layers, {experts} experts, {slots} slots on {ranks} ranks"
            for layers, experts, slots, ranks in sizes
        )
        raise ConfigError(f"the placement is of another model or world: it has {theirs}; served are {ours}")
