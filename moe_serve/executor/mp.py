"""One process per rank of an engine, started by the engine on its own machine, or by its launcher on each node."""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.base.commands import Meeting
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.executor.nodes import NodeWorkers
from moe_serve.executor.remote import JOIN_SECONDS, RemoteExecutor
from moe_serve.executor.starting import Starter
from moe_serve.executor.subprocesses import Subprocesses


class MultiprocessExecutor(RemoteExecutor):
    """Several ranks without further ado. With --nnodes, `announce` tells the other nodes where this listens."""

    def __init__(
        self, config: Config, meeting: Meeting, progress: Progress, *, announce: Callable[[str], None] | None = None
    ) -> None:
        parallel = config.parallel
        starter: Starter = Subprocesses() if announce is None else NodeWorkers(parallel.topology, announce)
        seconds = JOIN_SECONDS if announce is None else parallel.start_timeout_seconds  # nodes come in any order
        super().__init__(config, meeting, progress, starter, join_seconds=seconds)
