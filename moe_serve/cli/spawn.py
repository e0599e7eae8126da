"""A `moe-serve serve` of one's own: started as a child, waited for, and ended with its user."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from moe_serve.base.errors import ConfigError, EngineError, RankTimeout
from moe_serve.base.interpreter import module_command

READY = re.compile(r"^curl (https?://[^\s/]+)/v1/")
READY_SECONDS = 900.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def spawned_server(command: Sequence[str], *, ready_seconds: float = READY_SECONDS) -> Iterator[str]:
    """The address of a server that `command` starts, once it is ready; it is ended in the end, whatever happens.

    Its messages go to standard error. Raises ConfigError or EngineError when it ends early, RankTimeout when it is not
    ready in time.
    """
    with _ending_by_signal():
        # A session of its own: Ctrl-C stops an answer, not the server.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield _wait_ready(process, ready_seconds)
        finally:
            _end(process)


def serve_command(options: Sequence[str]) -> list[str]:
    """The command line of `moe-serve serve` in this Python."""
    return [*module_command("moe_serve"), "serve", *options]


def _wait_ready(process: subprocess.Popen[str], seconds: float) -> str:
    """The address in the ready line."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        with contextlib.suppress(queue.Empty):
            found = READY.match(lines.get(timeout=POLL_SECONDS))
            if found:
                return found[1]
            continue
        if ended:
            kind = ConfigError if process.returncode == 2 else EngineError
            raise kind(f"the server ended with code {process.returncode} before it was ready")
    raise RankTimeout(f"the server that was started is not ready after {seconds:g} s")


def _read(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    """To the end, so that the server never waits for a reader."""
    with stream:
        for line in stream:
            lines.put(line)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask, wait, end."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _ending_by_signal() -> Iterator[None]:
    """Being asked to end, or losing the terminal, unwinds like any other end."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, _exit) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _die_with_parent() -> None:
    """In the child: even a parent that was killed leaves no server behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
