"""One rank in this process, the engine's others in processes of their own that somebody else started, such as torchrun.

There is no driver: every process runs the same engine, decides the same from the same requests, and gives its own
worker the same commands. Only sampled tokens travel, from the last pipeline stage to those before it.
"""

from __future__ import annotations

import os
from concurrent.futures import Future

from moe_serve.base.commands import Command, LoadModel, Meeting, Reply, StepPlan, WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.errors import EngineError, MoEServeError
from moe_serve.base.launched import from_torchrun
from moe_serve.base.progress import Progress
from moe_serve.executor.stage_results import StageResults
from moe_serve.worker.choose import make_worker
from moe_serve.worker.worker import Worker


class ExternalLauncherExecutor:
    """Commands are carried out inside submit(); the future comes back finished. Not so that of a step on an earlier
    stage, whose `result()` waits for the last one, in the order in which steps began."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        self._topology = config.parallel.topology
        self._rank = from_torchrun(self._topology, os.environ).number
        self._meeting = meeting
        self._step_timeout = config.scheduler.step_timeout_seconds
        worker = self._topology.worker_index(self._rank)
        self._worker: Worker | None = make_worker(config, meeting, worker, progress, all_tensor_ranks_sample=True)
        self._results: StageResults | None = None

    def start(self) -> WorkerFacts:
        facts = self.submit(LoadModel()).result()
        assert isinstance(facts, WorkerFacts)
        stages = self._topology.pp_group(self._rank)
        if len(stages) > 1:
            self._results = StageResults(self._meeting, stages, self._rank, timeout_seconds=self._step_timeout)
        return facts

    def submit(self, command: Command) -> Future[Reply]:
        future: Future[Reply] = Future()
        try:
            if self._worker is None:
                raise EngineError("the executor is closed")
            reply = self._worker.handle(command)
            if isinstance(command, StepPlan) and self._results is not None:
                return self._results.exchange(reply)
            future.set_result(reply)
        except MoEServeError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        if self._results is not None:
            self._results.close()
            self._results = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None
