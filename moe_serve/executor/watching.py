"""Who is gone: a worker's end is seen by whoever started it (exit code, signal) or by its closed connection.

The first tells more, so a closed connection waits a moment for it. Other workers may end because one did: who was
killed is named before all, else who was gone first.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from moe_serve.base.errors import EngineError, MoEServeError, WorkerDied
from moe_serve.executor.seats import Seat

GRACE_SECONDS = 0.5
LOOK_SECONDS = 0.05
FATE_SECONDS = 3.0
"""For who started a worker to learn how it ended, where that takes longer than the closing of its connection."""
NEEDED = "while it was needed"


class Watch:
    """`await_closed(seconds)` returns seats whose connection closed, in order, as soon as there are some.

    `died` is called once from the thread, and again in cause(); the first call counts.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        *,
        await_closed: Callable[[float], Iterable[Seat]],
        died: Callable[[WorkerDied], None],
    ) -> None:
        self._seats = seats
        self._await_closed = await_closed
        self._died = died
        self._stopped = threading.Event()

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._look, name="watch", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        self._stopped.set()

    def note(self, gone: Iterable[Seat]) -> None:
        """From any thread: these cannot be reached any more, or have ended."""
        for seat in gone:
            if seat.gone_since is None:
                seat.gone_since = time.monotonic()

    def cause(self, seat: Seat, error: MoEServeError) -> MoEServeError:
        """A worker that failed in an exchange may have met with another's death, which is known a moment later."""
        others = [other for other in self._seats if other is not seat]
        deadline = time.monotonic() + GRACE_SECONDS
        culprit: Seat | None = None
        while isinstance(error, EngineError) and culprit is None and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            culprit = _first(other for other in others if _was_killed(other))
        if isinstance(error, EngineError) and culprit is None:
            # One with an exit code failed as well, and has said or will say why.
            closed = (other for other in others if other.gone_since is not None and not _said_why(other))
            culprit = _first(closed)
        if culprit is None:
            return error
        death = _death(culprit)
        self._died(death)
        return death

    def _look(self) -> None:
        told = False
        while not self._stopped.is_set():
            self.note(self._await_closed(LOOK_SECONDS))
            self.note(seat for seat in self._seats if seat.started.poll() is not None)
            if not told and (culprit := self._culprit()) is not None:
                told = True
                self._died(_death(culprit))

    def _culprit(self) -> Seat | None:
        """A worker that failed has said why: let its word arrive before its end counts."""
        late = time.monotonic() - GRACE_SECONDS
        killed = _first(seat for seat in self._seats if _was_killed(seat))
        return killed or _first(seat for seat in self._seats if seat.gone_since is not None and seat.gone_since < late)


def _first(seats: Iterable[Seat]) -> Seat | None:
    """Who of them was gone first; one whose end was not noticed yet comes last."""
    return min(seats, key=lambda seat: math.inf if seat.gone_since is None else seat.gone_since, default=None)


def _was_killed(seat: Seat) -> bool:
    return seat.started.knows_signals and (seat.started.poll() or 0) < 0


def _said_why(seat: Seat) -> bool:
    """One that ended of itself; where a kill looks the same, nobody knows."""
    return seat.started.knows_signals and seat.started.poll() is not None


def _death(seat: Seat) -> WorkerDied:
    deadline = time.monotonic() + (0 if seat.started.knows_signals else FATE_SECONDS)
    while seat.started.poll() is None and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    stopped = " (it is stopped)" if seat.started.is_stopped() else ""
    return seat.death(NEEDED) or WorkerDied(f"{seat.who} closed its connection or fell silent{stopped}")
