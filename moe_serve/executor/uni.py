"""The worker inside the engine's own process and thread: one rank per engine, nothing in between."""

from __future__ import annotations

from concurrent.futures import Future

from moe_serve.base.commands import Command, LoadModel, Meeting, Reply, WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, EngineError, MoEServeError
from moe_serve.base.progress import Progress
from moe_serve.worker.choose import make_worker
from moe_serve.worker.worker import Worker


class UniExecutor:
    """Commands are carried out inside submit(); the future comes back finished. `watches_load` as in Worker."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress, *, watches_load: bool = False) -> None:
        if config.parallel.world_size > 1:
            raise ConfigError(
                f"the uni executor holds one rank, but pipeline x tensor is {config.parallel.world_size}; "
                "choose --distributed-executor-backend mp"
            )
        self._worker: Worker | None = make_worker(config, meeting, 0, progress, watches_load=watches_load)

    def start(self) -> WorkerFacts:
        facts = self.submit(LoadModel()).result()
        assert isinstance(facts, WorkerFacts)
        return facts

    def submit(self, command: Command) -> Future[Reply]:
        future: Future[Reply] = Future()
        try:
            if self._worker is None:
                raise EngineError("the executor is closed")
            future.set_result(self._worker.handle(command))
        except MoEServeError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
