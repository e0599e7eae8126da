"""Where a rank is right now: one mutable note that the computing thread writes and the heartbeat thread reads."""

from __future__ import annotations

import time


class Progress:
    """`enter()` is called on the token path: two attribute stores and a clock read, no lock."""

    __slots__ = ("phase", "since", "step")

    def __init__(self) -> None:
        self.step = 0
        self.phase = "starting"
        self.since = time.monotonic()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note that the rank now does `phase` (for example "layer 3 dispatch"), in `step` if that changed."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.since = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the last enter()."""
        return time.monotonic() - self.since
