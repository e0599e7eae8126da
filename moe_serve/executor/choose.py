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
from moe_serve.executor.ray_settings import Surroundings, refuse_ray_options, settle_ray, surroundings

METHODS = ("start", "submit", "close")


def settle_executor(parallel: ParallelConfig) -> dict[str, object]:
    """Options of the executor as they will be run, also in processes that this one's Ray does not surround.

    MissingExtra or ConfigError for what cannot be.
    """
    around = surroundings()
    name = parallel.distributed_executor_backend or default_executor(parallel, around)
    settled: dict[str, object] = {"distributed_executor_backend": name}
    if name == "ray":
        return settled | settle_ray(parallel, around)
    refuse_ray_options(parallel, name)
    return settled


def default_executor(parallel: ParallelConfig, around: Surroundings) -> str:
    """uni for one rank per engine; of several, ray for those inside a Ray placement group, else mp."""
    if parallel.world_size == 1:
        return "uni"
    return "ray" if around.placement_group and not parallel.is_spread else "mp"


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
