"""What a placement would bring under a load, and how the load is split over copies: pure, without any state.

Shape letters: L layers, E logical experts, R expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.nodes import NodeSizes
from moe_serve.eplb.placement import Placement, moves
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.rearrangement import Proposal, chunks_of
from moe_serve.eplb.saving import Slots, WindowPart, saving_of
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

    def plan(
        self, load_LE: Floats, served: Placement, wanted: Placement, *, epoch: int = 0, parts: Sequence[WindowPart] = ()
    ) -> Proposal:
        """From the placement served since `epoch` to another; ConfigError if that is of another model or world.

        `parts` add up to the load; without them nothing is said of the time that would be saved.
        """
        check_alike(served, wanted)
        old, new = self.split(load_LE, served), self.split(load_LE, wanted)
        before, after = _by_rank(old, load_LE), _by_rank(new, load_LE)
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
            saving=saving_of(parts, _of_parts(old, parts), _of_parts(new, parts)) if parts else None,
        )

    def split(self, load_LE: Floats, placement: Placement) -> Split:
        """The shares of copies that even the ranks out."""
        return solve_split(placement, load_LE, node_sizes=self.node_sizes, prefer_local=self.prefer_local)

    def rank_loads(self, load_LE: Floats, placement: Placement) -> Floats:
        """float64 (L, R): rows each rank computes, split so."""
        return _by_rank(self.split(load_LE, placement), load_LE)


def _by_rank(split: Split, load_LE: Floats) -> Floats:
    return sum_by_rank(split_loads(split, load_LE), split.placement.offsets)


def _of_parts(split: Split, parts: Sequence[WindowPart]) -> list[Slots]:
    return [Slots(split_loads(split, part.load_LE) / part.steps, split.placement.offsets) for part in parts]


def check_alike(served: Placement, other: Placement) -> None:
    """ConfigError with the sizes of both unless they are of one model and world."""
    sizes = [(p.num_layers, p.num_logical, p.num_physical, p.num_ranks) for p in (other, served)]
    if sizes[0] != sizes[1] or served.offsets != other.offsets:
        theirs, ours = (
            f"{layers} layers, {experts} experts, {slots} slots on {ranks} ranks"
            for layers, experts, slots, ranks in sizes
        )
        raise ConfigError(f"the placement is of another model or world: it has {theirs}; served are {ours}")
