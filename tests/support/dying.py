"""An executor that ends or stops its own process in a chosen phase of a rearrangement.

Named by --distributed-executor-backend; TEST_DEATH holds "PHASE SIGNAL DP_RANK", for example
"committing SIGSTOP 1".
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future

from moe_serve.base.commands import Command, Meeting, PollStage, Reply, StageExperts, StageStatus, StepPlan, StepResult
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.executor.uni import UniExecutor

ENVIRONMENT = "TEST_DEATH"
PHASES = ("asked", "moving", "staged", "committing", "committed")


class DyingExecutor(UniExecutor):
    """Phases: "asked" before a stage is taken up, "moving" once a piece is posted, "staged" once all is here,
    "committing" before this rank commits, "committed" after it has.
    """

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        super().__init__(config, meeting, progress)
        phase, name, rank = os.environ[ENVIRONMENT].split()
        assert phase in PHASES
        self._phase = phase if int(rank) == meeting.dp_rank else ""
        self._signal = signal.Signals[name]

    def submit(self, command: Command) -> Future[Reply]:
        match command:
            case StageExperts():
                self._reach("asked")
            case StepPlan(commit_epoch=epoch) if epoch:
                self._reach("committing")
        future = super().submit(command)
        reply = future.result()
        stage = reply.stage if isinstance(reply, StepResult) else reply if isinstance(command, PollStage) else None
        if isinstance(stage, StageStatus) and stage.epoch:
            self._reach("staged" if stage.staged else "moving" if stage.pieces_posted else "")
        if isinstance(command, StepPlan) and command.commit_epoch:
            self._reach("committed")
        return future

    def _reach(self, phase: str) -> None:
        if self._phase and phase == self._phase:
            self._phase = ""
            os.kill(os.getpid(), self._signal)
