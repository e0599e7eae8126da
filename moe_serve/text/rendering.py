"""The parent's end of a process that renders chat templates: started when needed, ended when it takes too long.

Whatever happens to it is the affair of the one conversation that it was about; the next one gets a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from moe_serve.base.errors import Overloaded, RequestError
from moe_serve.base.interpreter import import_environment, module_command
from moe_serve.text.template_wire import encode, receive, send

START_SECONDS = 60.0
"""For a process to come up on a machine that is busy with loading a model."""
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHON", "VIRTUAL_ENV", "LANG", "LC_", "TZ")
GRACE_SECONDS = 2.0
"""After which a process that its own alarm should have ended is ended from here."""


class TemplateSetup(msgspec.Struct, frozen=True):
    """What a process is told once. `seconds` one conversation may take.

    `added_tokens` (text, special) where control tokens in conversations are to be marked, else None; `control_tokens`
    those that the folder names itself.
    """

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]
    seconds: float
    added_tokens: Sequence[tuple[str, bool]] | None = None
    control_tokens: Sequence[str] | None = None


class TookTooLong(Exception):
    """A template was compiled or rendered for longer than its seconds."""


class BrokeDown(Exception):
    """The process ended, which no template should bring about."""


class RenderProcess:
    """One conversation at a time, for any thread; who waits longer than one may take gets Overloaded."""

    def __init__(self, setup: TemplateSetup) -> None:
        self._setup = setup
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self.broken: dict[str, str] = {}

    def start(self) -> None:
        """Compile the templates, so that `broken` says which cannot be used and why. TookTooLong, BrokeDown."""
        with self._alone():
            self._running()

    def render(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """What Templates.render() answers. TookTooLong, BrokeDown; RequestError for what is no plain data."""
        try:
            frame = encode(dict(job))
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(
                f"messages, tools and template variables must be plain data: {error}", param="messages"
            ) from error
        with self._alone():
            answer: dict[str, Any] = json.loads(self._exchange(self._running(), frame, self._setup.seconds))
            return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._child is not None:
            self._child.end()
            self._child = None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=self._setup.seconds + GRACE_SECONDS):
            raise Overloaded("other conversations wait for the chat template", reason="queued_reqs")
        try:
            yield
        finally:
            self._lock.release()

    def _running(self) -> _Child:
        if self._child is None:
            child = self._child = _Child()
            frame = encode(msgspec.to_builtins(self._setup))
            self.broken = json.loads(self._exchange(child, frame, START_SECONDS + self._setup.seconds))
        return self._child

    def _exchange(self, child: _Child, frame: bytes, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds + GRACE_SECONDS
        try:
            send(child.line, frame, deadline)
            return receive(child.line, deadline)
        except TimeoutError:
            child.end()
            raise TookTooLong from None
        except (EOFError, OSError):
            code = child.wait()
            if code == -signal.SIGALRM:
                raise TookTooLong from None
            raise BrokeDown(f"its process ended ({_fate(code)})") from None
        except BaseException:  # its answer would be taken for the next one's
            child.end()
            raise
        finally:
            if not child.end.alive:
                self._child = None


class _Child:
    """A process and the line to it; ended at the latest when nobody refers to it any more."""

    def __init__(self) -> None:
        self.line, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                module_command("moe_serve.text.template_process"),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**without_secrets(os.environ), **import_environment()},
                start_new_session=True,
            )
        finally:
            theirs.close()
        self.end = weakref.finalize(self, _end, self._process, self.line)

    def wait(self) -> int:
        """Its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        self.end()
        return self._process.returncode or 0


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What an interpreter needs and a template may depend on (time zone, language), and nothing else."""
    return {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}


def _end(process: subprocess.Popen[bytes], line: socket.socket) -> None:
    line.close()
    process.kill()
    process.wait()


def _fate(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
