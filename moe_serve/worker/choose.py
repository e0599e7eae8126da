"""Which class a config asks its workers to be of: the one that is here, or somebody else's, each with or without more
mixed in. Every worker is made here, whatever process it is in.
"""

from __future__ import annotations

from typing import cast

from moe_serve.base.commands import Meeting
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.progress import Progress
from moe_serve.base.registry import import_target
from moe_serve.worker.worker import Worker


def make_worker(
    config: Config,
    meeting: Meeting,
    worker: int,
    progress: Progress,
    *,
    watches_load: bool = False,
    all_tensor_ranks_sample: bool = False,
) -> Worker:
    """Arguments as those of Worker. ConfigError or MissingExtra for a class that cannot be."""
    return choose_worker(config.parallel)(
        config,
        meeting,
        worker,
        progress,
        watches_load=watches_load,
        all_tensor_ranks_sample=all_tensor_ranks_sample,
    )


def choose_worker(parallel: ParallelConfig) -> type[Worker]:
    """What worker_cls and worker_extension_cls say."""
    chosen: type[Worker] = Worker
    if parallel.worker_cls is not None:
        found = _import(parallel.worker_cls, "--worker-cls")
        if not issubclass(found, Worker):
            raise ConfigError(
                f"--worker-cls {parallel.worker_cls!r} is no subclass of moe_serve.worker.worker:Worker; make it one, "
                "and override what is to be otherwise"
            )
        chosen = found
    if parallel.worker_extension_cls is None:
        return chosen
    extension = _import(parallel.worker_extension_cls, "--worker-extension-cls")
    if doubled := sorted(_names(extension) & _names(chosen)):
        raise ConfigError(
            f"--worker-extension-cls {parallel.worker_extension_cls!r} has {', '.join(doubled)}, as the worker class "
            f"{chosen.__name__} has; give it other names, or override in a class for --worker-cls"
        )
    return cast(type[Worker], type(f"{chosen.__name__}With{extension.__name__}", (chosen, extension), {}))


def _import(target: str, option: str) -> type:
    try:
        found = import_target(target, option, target)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"{option} {target!r} names no class: {error}; give package.module:Class") from error
    if not isinstance(found, type):
        raise ConfigError(f"{option} {target!r} is no class but a {type(found).__name__}; give package.module:Class")
    return found


def _names(of: type) -> set[str]:
    """But for those that every class has."""
    return {name for name in dir(of) if not (name.startswith("__") and hasattr(object, name))} - CLASS_NAMES


CLASS_NAMES = {"__dict__", "__module__", "__weakref__", "__annotations__", "__firstlineno__", "__static_attributes__"}
