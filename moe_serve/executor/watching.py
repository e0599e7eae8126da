"""Who is gone: a worker's end is seen by whoever started it (exit code, signal) or by its closed connection.

The first tells more, so a closed connection waits a moment for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from moe_serve.base.errors import EngineError, MoEServeError, WorkerDied
from moe_serve.executor.seats import Seat

GRACE_SECONDS = 0.5
LOOK_SECONDS = 0.02
NEEDED = "while it was needed"


class Watch:
    """Calls `died` from its own thread or in blame(). `probe()` returns who is not connected any more."""

    def __init__(
        self, seats: Sequence[Seat], *, probe: Callable[[], list[Seat]], died: Callable[[WorkerDied], None]
    ) -> None:
        self._seats = seats
        self._probe = probe
        self._died = died
        self._stopped = threading.Event()

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._look, name="watch", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        self._stopped.set()

    def blame(self, lost: Sequence[Seat]) -> None:
        """A closed connection is mostly a death."""
        for seat in lost:
            deadline = time.monotonic() + GRACE_SECONDS
            while (death := seat.death(NEEDED)) is None and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)
            self._died(death or _closed(seat))

    def cause(self, seat: Seat, error: MoEServeError) -> MoEServeError:
        """A worker that failed in an exchange may have met with another's death, which is known a moment later."""
        if not isinstance(error, EngineError):
            return error
        others = [other for other in self._seats if other is not seat]
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            for other in others:
                if (other.started.poll() or 0) < 0:
                    return other.death(NEEDED) or error
            time.sleep(LOOK_SECONDS)
        lost = self._probe()
        # One with an exit code failed as well, and has said or will say why.
        return next((_closed(other) for other in others if other in lost and other.started.poll() is None), error)

    def _look(self) -> None:
        """A worker that failed has said why; let its word arrive before its exit code counts."""
        ended: dict[str, float] = {}
        while not self._stopped.wait(LOOK_SECONDS):
            now = time.monotonic()
            for seat in self._seats:
                code = seat.started.poll()
                if code is None or (code >= 0 and now - ended.setdefault(seat.name, now) < GRACE_SECONDS):
                    continue
                if death := seat.death(NEEDED):
                    self._died(death)
                    return


def _closed(seat: Seat) -> WorkerDied:
    stopped = " (it is stopped)" if seat.started.is_stopped() else ""
    return WorkerDied(f"{seat.who} closed its connection or fell silent{stopped}")
