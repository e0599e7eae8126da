"""An executor whose rank stops, or hangs while its heartbeats go on, when it enters a chosen phase of a step.

Named by --distributed-executor-backend; TEST_TRAP holds "PHASE HOW DP_RANK FILE", for example
"DISPATCH SIGSTOP 1 /tmp/armed": nothing happens before the file exists.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from moe_serve.base.commands import Meeting
from moe_serve.base.config import Config
from moe_serve.base.progress import Phase, Progress
from moe_serve.executor.uni import UniExecutor

ENVIRONMENT = "TEST_TRAP"
HANG = "HANG"
FOREVER_SECONDS = 3600.0


class TrappedProgress(Progress):
    """Passes every note on to the one that the heartbeats read, and does not come back from the trap."""

    __slots__ = ("_armed", "_how", "_told", "_trap")

    def __init__(self, told: Progress, trap: Phase, how: str, armed: Path) -> None:
        super().__init__()
        self._told, self._trap, self._how, self._armed = told, trap, how, armed

    def enter(self, phase: Phase, *, step: int | None = None, layer: int | None = None) -> None:
        super().enter(phase, step=step, layer=layer)
        self._told.enter(phase, step=step, layer=layer)
        if phase is not self._trap or not self._armed.exists():
            return
        if self._how == HANG:
            time.sleep(FOREVER_SECONDS)
        os.kill(os.getpid(), signal.Signals[self._how])


class TrappedExecutor(UniExecutor):
    """On the chosen rank only."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        phase, how, rank, armed = os.environ[ENVIRONMENT].split()
        if int(rank) == meeting.dp_rank:
            progress = TrappedProgress(progress, Phase[phase], how, Path(armed))
        super().__init__(config, meeting, progress)
