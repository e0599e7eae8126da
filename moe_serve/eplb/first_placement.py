"""The placement a world starts with, by its options: every rank and the coordinator work it out alike."""

from __future__ import annotations

import hashlib
from pathlib import Path

from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import ModelConfig
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


def placement_digest(parallel: ParallelConfig, model: ModelConfig) -> str:
    """Of the first placement's table; "" where experts are not placed but cut. ConfigError as first_placement."""
    if not parallel.enable_expert_parallel:
        return ""
    placement = first_placement(parallel, num_layers=len(model.moe_layers), num_experts=model.num_experts)
    return hashlib.sha256(placement.physical_to_logical_LP.tobytes()).hexdigest()


def check_placement(expected: str, parallel: ParallelConfig, model: ModelConfig) -> None:
    """Raise ConfigError where experts start otherwise here than the coordinator counts on ("": on nothing)."""
    if expected and placement_digest(parallel, model) != expected:
        file = parallel.expert_placement_file
        raise ConfigError(
            f"experts are placed otherwise here than at the coordinator: the file {file} must be the same on every "
            "node (--expert-placement-file)"
        )
