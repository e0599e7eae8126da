"""A worker process for which loading weights takes longer, and that notes when it does: a Starter, and its program.

Everything else is the real thing: `python -m tests.support.slow_reader FILE` is moe_serve.worker.process but for the
Progress that it writes its phases to. A line of FILE is a moment of the machine's monotonic clock and a phase.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from moe_serve.base.progress import Phase, Progress
from moe_serve.executor.subprocesses import WorkerChild
from moe_serve.worker.process import WorkerProcess
from moe_serve.worker.wire import Invitation

LOAD_SECONDS = 1.0


class NotedProgress(Progress):
    """Every phase that is entered becomes a line; in LOAD the rank then sleeps for a while."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def enter(self, phase: Phase, *, step: int | None = None, layer: int | None = None) -> None:
        super().enter(phase, step=step, layer=layer)
        with self._path.open("a") as file:
            file.write(f"{time.monotonic()} {phase.name}\n")
        if phase is Phase.LOAD:
            time.sleep(LOAD_SECONDS)


class SlowReaders:
    """A Starter; `phases(worker)` are the moments and phases so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, worker: int, invitation: Invitation) -> WorkerChild:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.slow_reader", str(self._path(worker))],
            env=invitation.to_environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return WorkerChild(process)

    def phases(self, worker: int) -> list[tuple[float, Phase]]:
        lines = [line.split() for line in self._path(worker).read_text().splitlines()]
        return [(float(moment), Phase[name]) for moment, name in lines]

    def loading(self, worker: int) -> tuple[float, float]:
        """When the worker entered the phase in which it reads weights, and when it left it."""
        phases = self.phases(worker)
        (place,) = (place for place, (_, phase) in enumerate(phases) if phase is Phase.LOAD)
        return phases[place][0], phases[place + 1][0]

    def _path(self, worker: int) -> Path:
        return self._folder / f"worker-{worker}"


def main() -> int:
    process = WorkerProcess(Invitation.from_environment(os.environ))
    process._progress = NotedProgress(Path(sys.argv[1]))
    return process.run()


if __name__ == "__main__":
    os._exit(main())
