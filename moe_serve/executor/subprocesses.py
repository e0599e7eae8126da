"""Workers as child processes of the engine, on its machine."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from moe_serve.base.interpreter import module_command
from moe_serve.executor.starting import describe_code
from moe_serve.worker.wire import Invitation

GONE_SECONDS = 3.0
"""SIGKILL is not at once for a process that gives back much memory."""


class WorkerChild:
    """A worker that is a child of this process."""

    knows_signals = True

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def who(self) -> str:
        return f"pid {self._process.pid} on this machine"

    def poll(self) -> int | None:
        return self._process.poll()

    def fate(self) -> str:
        return describe_code(self._process.returncode)

    def kill(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GONE_SECONDS)

    def is_stopped(self) -> bool:
        """As far as Linux says."""
        try:
            return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False


class Subprocesses:
    """A Starter."""

    def start(self, worker: int, invitation: Invitation) -> WorkerChild:
        process = subprocess.Popen(
            module_command("moe_serve.worker.process"),
            env=invitation.to_environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return WorkerChild(process)
