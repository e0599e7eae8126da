"""The rebalancer that a resolved configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_serve.base.config import Config
from moe_serve.base.model_config import load_model_config
from moe_serve.eplb.first_placement import first_placement
from moe_serve.eplb.rebalancer import Rebalancer


def make_rebalancer(config: Config, *, unix_time: Callable[[], float]) -> Rebalancer | None:
    """None where load balancing is off. ConfigError for a placement file that does not fit.

    How large an expert is it must be told: only the workers know in what form they keep one.
    """
    parallel = config.parallel
    if not parallel.enable_eplb:
        return None
    model = load_model_config(Path(config.model.model or ""))
    placement = first_placement(parallel, num_layers=len(model.moe_layers), num_experts=model.num_experts)
    return Rebalancer(
        parallel.eplb_config,
        parallel.topology,
        placement,
        num_groups=model.router.num_groups,
        unix_time=unix_time,
    )
