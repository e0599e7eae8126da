"""Log lines that strangers can cause: one at a time, with how many were left out."""

from __future__ import annotations

import logging
from collections.abc import Callable

QUIET_SECONDS = 10.0


class QuietLog:
    """`clock` in seconds. Used by one thread."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock
        self._next = 0.0
        self._left_out = 0

    def warning(self, line: str, *values: object) -> None:
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        more = f" (and {self._left_out} like it in the last {QUIET_SECONDS:g} s or more)" if self._left_out else ""
        self._log.warning(line + "%s", *values, more)
        self._next, self._left_out = now + QUIET_SECONDS, 0
