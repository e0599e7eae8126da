"""Which executor a config asks for: a name of the table, or a class of somebody else's."""

from __future__ import annotations

from typing import cast

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import import_target
from moe_serve.base.tables import EXECUTORS
from moe_serve.executor.base import Executor

METHODS = ("start", "submit", "close")


def choose_executor(config: Config) -> type[Executor]:
    """uni for one rank per engine and mp for several, unless distributed_executor_backend says otherwise."""
    asked = config.parallel.distributed_executor_backend
    name = asked or ("uni" if config.parallel.world_size == 1 else "mp")
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
