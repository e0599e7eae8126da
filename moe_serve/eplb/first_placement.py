"""The placement a world starts with, by its options: every rank and the coordinator work it out alike."""

from __future__ import annotations

from pathlib import Path

from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.eplb.placement_file import read_placement


def first_placement(parallel: ParallelConfig, *, num_layers: int, num_experts: int) -> Placement:
    """From --expert-placement-file, else by --expert-placement-strategy. ConfigError for a file that does not fit."""
    ranks, redundant = parallel.topology.ep, parallel.eplb_config.num_redundant_experts
    if redundant > num_experts * (ranks - 1):
        raise ConfigError(
            f"eplb_config.num_redundant_experts {redundant} is more than can be of use: {num_experts} experts on "
            f"{ranks} ranks have room for {num_experts * (ranks - 1)} copies more, when each rank holds every expert"
        )
    if parallel.expert_placement_file is not None:
        return read_placement(
            Path(parallel.expert_placement_file),
            num_layers=num_layers,
            num_experts=num_experts,
            num_ranks=ranks,
            num_redundant=redundant,
        )
    return initial_placement(
        parallel.expert_placement_strategy,
        num_layers=num_layers,
        num_experts=num_experts,
        num_ranks=ranks,
        num_redundant=redundant,
    )
