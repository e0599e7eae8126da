"""What a placement would bring under a load, and how the load is split over copies: pure, without any state.

Shape letters: L layers, E logical experts, R expert-parallel ranks, C most copies of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.placement import Placement, moves
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.rearrangement import Proposal
from moe_serve.eplb.search.scores import mean_of_ratios, ratio_of_sums, sum_by_rank
from moe_serve.eplb.search.weights import Split, solve_split, split_loads


@dataclass(frozen=True, slots=True)
class Forecast:
    """`expert_bytes` of one expert's weights in one layer; copies on the token's rank or node first, or not."""

    num_nodes: int
    prefer_local: bool
    expert_bytes: int

    def plan(self, load_LE: Floats, served: Placement, wanted: Placement) -> Proposal:
        """From one placement to another; ConfigError if `wanted` is of another model or world."""
        check_alike(served, wanted)
        before, after = self.rank_loads(load_LE, served), self.rank_loads(load_LE, wanted)
        gain = 1.0 - ratio_of_sums(before) / ratio_of_sums(after)
        num_moves = len(moves(served, wanted))
        return Proposal(
            wanted, mean_of_ratios(before), mean_of_ratios(after), gain, num_moves, num_moves * self.expert_bytes
        )

    def split(self, load_LE: Floats, placement: Placement) -> Split:
        """The shares of copies that even the ranks out."""
        return solve_split(placement, load_LE, num_nodes=self.num_nodes, prefer_local=self.prefer_local)

    def rank_loads(self, load_LE: Floats, placement: Placement) -> Floats:
        """float64 (L, R): rows each rank computes, split so."""
        return sum_by_rank(split_loads(self.split(load_LE, placement), load_LE), placement.offsets)


def cumulative_shares(split: Split, ranks: Iterable[int], layers: list[int]) -> dict[int, bytes]:
    """What ExpertMap takes: cumulative shares of some layers, float32 (layers, E, C), by expert-parallel rank."""
    return {rank: split.cumulative(rank)[1][layers].astype(np.float32).tobytes() for rank in ranks}


def check_alike(served: Placement, other: Placement) -> None:
    """ConfigError with the sizes of both unless they are of one model and world."""
    sizes = [(p.num_layers, p.num_logical, p.num_physical, p.num_ranks) for p in (other, served)]
    if sizes[0] != sizes[1] or served.offsets != other.offsets:
        theirs, ours = (
            f"{layers} layers, {experts} experts, {slots} slots on {ranks} ranks"
            for layers, experts, slots, ranks in sizes
        )
        raise ConfigError(f"the placement is of another model or world: it has {theirs}; served are {ours}")
