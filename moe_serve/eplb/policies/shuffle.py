"""A random valid placement for each seed: for tests, which want many moves and any placement."""

from __future__ import annotations

import numpy as np

from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Problem


def shuffle(problem: Problem) -> Placement:
    """Every expert once, the redundant slots anyhow, all in a random order; two copies may meet on a rank."""
    generator = np.random.default_rng(problem.seed)
    layers, experts, slots = problem.num_layers, problem.num_experts, problem.num_physical
    once = np.tile(np.arange(experts), (layers, 1))
    more = generator.integers(0, experts, size=(layers, slots - experts))
    table_LP = generator.permuted(np.concatenate([once, more], axis=1), axis=1)
    return Placement(table_LP.astype(np.int64), problem.offsets, experts)
