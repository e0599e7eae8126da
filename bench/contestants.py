"""Children that take turns: each has loaded what it measures, and answers a line of JSON on stdin with one on stdout.

Between its turns a contestant waits for a line, so that whoever has the turn has the cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

CLOSING_SECONDS = 30.0
ERROR = re.compile(r"\b\w*(?:Error|Exception)\b")


class ContestantEnded(SystemExit):
    """A contestant ended or did not answer in time. Ends the benchmark with its message unless it is caught."""


class Contestant:
    """A child started as `told`; it has a process group of its own, so that its children end with it.

    `log` takes what it says on stderr (inherited if not given); `patience` is how many seconds it may take to answer.
    """

    def __init__(
        self,
        told: Sequence[str | Path],
        environment: Mapping[str, str],
        folder: Path,
        *,
        log: Path | None = None,
        patience: float | None = None,
    ) -> None:
        self._log, self._patience = log, patience
        with contextlib.ExitStack() as opened:
            stderr = None if log is None else opened.enter_context(log.open("wb"))
            self._child = subprocess.Popen(
                list(map(str, told)),
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,
            )
        os.set_blocking(self._pipes()[0].fileno(), False)

    def ask(self, **order: object) -> Any:
        """What it answers to an order. Raises ContestantEnded."""
        ask, answer = self._pipes()
        unsent, heard = memoryview(json.dumps(order).encode() + b"\n"), bytearray()
        deadline = None if self._patience is None else time.monotonic() + self._patience
        while not heard.endswith(b"\n"):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([answer], [ask] if unsent else [], [], left)
            if not readable and not writable:
                raise ContestantEnded(f"no answer within {self._patience:g} seconds")
            try:
                if writable:
                    unsent = unsent[os.write(ask.fileno(), unsent[: select.PIPE_BUF]) :]
            except BrokenPipeError:
                raise ContestantEnded(self._why()) from None
            if readable:
                part = os.read(answer.fileno(), 1 << 16)
                if not part:
                    raise ContestantEnded(self._why())
                heard += part
        return json.loads(heard)

    def cpu_seconds(self) -> float:
        """Time that it and its children have spent on cores."""
        spent = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._child.pid)
            for each in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    spent += times.user + times.system
        return spent

    def close(self) -> None:
        """Let it end, and end whatever of it is left."""
        for pipe in self._pipes():
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(CLOSING_SECONDS)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for pipe in self._pipes():
            pipe.close()

    def _why(self) -> str:
        try:
            code = self._child.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its pipes, but did not end"
        said = "" if self._log is None else last_error(self._log.read_text(encoding="utf-8", errors="replace"))
        return f"a contestant ended with code {code}" + (f": {said}" if said else "")

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        return self._child.stdin, self._child.stdout


def last_error(said: str) -> str:
    """The last line that names an error, else the last line; "" where nothing was said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.search(line)]
    return (errors or lines or [""])[-1]
