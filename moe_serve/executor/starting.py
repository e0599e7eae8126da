"""How workers come into being: somebody starts each with an invitation. An executor does not know how it is done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moe_serve.worker.wire import Invitation


def describe_code(code: int) -> str:
    """A process's end by its exit code, or minus the signal that killed it."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Started(Protocol):
    """A worker that was started, as far as its starter can follow it. Used from several threads."""

    @property
    def who(self) -> str:
        """For people, until the worker has joined and says so itself: `pid 12 on this machine`."""
        ...

    @property
    def knows_signals(self) -> bool:
        """Whether poll() tells a kill from an end of its own; if not, ends count as connections closed, in order."""
        ...

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it. None while it runs, and always where nobody can know."""
        ...

    def fate(self) -> str:
        """How it ended, for people, where poll() gave a code: `was killed by SIGKILL`."""
        ...

    def kill(self) -> None:
        """End it at once, and see it gone for a bounded time. Nothing where it is not ours to end; safe to repeat."""
        ...

    def is_stopped(self) -> bool:
        """Whether it is known to be stopped: who waits for others then waits for this one."""
        ...


class Starter(Protocol):
    """A machine's processes, a cluster's actors, somebody else's pods."""

    def start(self, worker: int, invitation: Invitation) -> Started:
        """Start the worker with this index. Called once for each, in order, when the engine listens already.

        Does not wait for the worker: that it has come is seen when it joins.
        """
        ...


@dataclass(frozen=True, slots=True)
class StartedElsewhere:
    """Known by its connection alone: when that closes the worker is gone, and it ends itself when the engine does."""

    who: str = "started by somebody else"
    knows_signals: bool = True

    def poll(self) -> None:
        return None

    def fate(self) -> str:
        return "is gone"

    def kill(self) -> None:
        pass

    def is_stopped(self) -> bool:
        return False


class RunsAlready:
    """For workers that somebody else starts. `publish(worker, invitation)` lets them know where to come."""

    def __init__(self, publish: Callable[[int, Invitation], None]) -> None:
        self._publish = publish

    def start(self, worker: int, invitation: Invitation) -> StartedElsewhere:
        self._publish(worker, invitation)
        return StartedElsewhere()
