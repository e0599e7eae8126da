"""Which executor a config asks for: a name of the table, or a class of somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from moe_serve.base.commands import Meeting
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.progress import Progress
from moe_serve.base.registry import import_target
from moe_serve.base.tables import EXECUTORS
from moe_serve.executor.base import Executor
from moe_serve.executor.ray_settings import (
    Surroundings,
    check_installed,
    check_ray_engines,
    refuse_ray_options,
    settle_ray,
    surroundings,
)

METHODS = ("start", "submit", "close")


def settle_executor(parallel: ParallelConfig, *, gpus: int = 0) -> dict[str, object]:
    """Options of the executor as they will be run, also in processes that this one's Ray does not surround. `gpus` that
    ranks on this machine may use; 0 where they compute on something else.

    MissingExtra or ConfigError for what cannot be.
    """
    around = surroundings()
    name = parallel.distributed_executor_backend or default_executor(parallel, around, gpus=gpus)
    settled: dict[str, object] = {"distributed_executor_backend": name}
    if parallel.data_parallel_backend == "ray":
        check_ray_engines(parallel, name)
    if "ray" in (name, parallel.data_parallel_backend):
        return settled | settle_ray(parallel, around)
    refuse_ray_options(parallel, name)
    return settled


def default_executor(parallel: ParallelConfig, around: Surroundings, *, gpus: int = 0) -> str:
    """uni for one rank per engine. Of several, ray inside a Ray placement group, in engines of Ray's, and where an
    engine must lie over several nodes for want of GPUs; else mp."""
    if parallel.world_size == 1:
        return "uni"
    if parallel.is_spread:
        return "mp"
    if around.placement_group or parallel.data_parallel_backend == "ray":
        return "ray"
    if not 0 < gpus < parallel.world_size:
        return "mp"
    check_installed(
        f"an engine of {parallel.world_size} ranks (pipeline x tensor), which must lie over several nodes as this "
        f"machine has fewer GPUs ({gpus}),",
        "start a cluster, or say --distributed-executor-backend mp, for ranks that share GPUs",
    )
    return "ray"


def make_executor(config: Config, meeting: Meeting, progress: Progress, *, announce: Callable[[str], None]) -> Executor:
    """`announce` tells other nodes at which address the engine listens for the workers that they start (--nnodes)."""
    kind: Any = choose_executor(config)
    spread = {"announce": announce} if config.parallel.is_spread else {}
    executor: Executor = kind(config, meeting, progress, **spread)
    return executor


def choose_executor(config: Config) -> type[Executor]:
    """What distributed_executor_backend says, or default_executor()."""
    name = config.parallel.distributed_executor_backend or default_executor(config.parallel, surroundings())
    if ":" not in name:
        return cast(type[Executor], EXECUTORS.load(name))
    try:
        found = import_target(name, EXECUTORS.kind, name)
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"{EXECUTORS.option} {name!r} names no class: {error}; give package.module:Class or one of "
            f"{', '.join(EXECUTORS)}"
        ) from error
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if not isinstance(found, type) or missing:
        raise ConfigError(
            f"{EXECUTORS.option} {name!r} is no executor class: it needs {', '.join(METHODS)} "
            "(see moe_serve.executor.base)"
        )
    return cast(type[Executor], found)
