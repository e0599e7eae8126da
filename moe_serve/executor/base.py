"""How a command reaches an engine's workers. Torch-free; implementations are reached through base.tables.EXECUTORS."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from moe_serve.base.commands import Command, Reply, WorkerFacts
from moe_serve.base.commands import Meeting as Meeting
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress


class Executor(Protocol):
    """Made as `Executor(config, meeting, progress)`; `config` is resolved (its model is a folder)."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None: ...

    def start(self) -> WorkerFacts:
        """Start the workers and load the model. Facts are the least (blocks) or the sum (bytes) over the workers.

        Raises ConfigError for the operator's mistakes, EngineError otherwise.
        """
        ...

    def submit(self, command: Command) -> Future[Reply]:
        """Send a command to every worker; the future holds one reply once all have answered.

        A step's tokens are those of the worker that samples (Topology.sampling_worker; see executor/replies.py).

        Its exception is WorkerDied when a worker is gone, EngineError when one failed.
        """
        ...

    def close(self) -> None:
        """End the workers; bounded; safe to call twice."""
        ...
