"""How fast what waits begins, hence how much may wait so that nobody waits too long. Pure: the caller has the clock.

Only time in which somebody waits tells what the engines can do. Such evidence fades, and while nobody waits so does
what was learned: the next rush may be of another kind.
"""

from __future__ import annotations

import math

MAX_WAIT_SECONDS = 30.0
"""What an admitted request should wait at most."""
MEMORY_SECONDS = 30.0


class Pace:
    """Of one quantity: requests, or tokens of their prompts.

    Before anything is known, as much is expected to begin in MAX_WAIT_SECONDS as may wait at most (`most`). That
    counts as much as half of these seconds of evidence.
    """

    def __init__(self, now: float) -> None:
        self._at = now
        self._begun = 0.0
        self._seconds = 0.0
        self._expected = 1.0

    def pass_time(self, now: float, *, busy: bool) -> None:
        """`busy`: somebody waited all the while since the last call."""
        kept = math.exp(-max(0.0, now - self._at) / MEMORY_SECONDS)
        self._at = max(now, self._at)
        self._begun *= kept
        self._seconds *= kept
        if busy:
            self._seconds += MEMORY_SECONDS * (1 - kept)
            self._expected *= kept
        else:
            self._expected = 1 - (1 - self._expected) * kept

    def began(self, amount: float) -> None:
        """So much of what waited has begun."""
        self._begun += amount

    def fitting(self, most: int) -> float:
        """How much of what waits will begin in MAX_WAIT_SECONDS; never more than `most`."""
        half = MAX_WAIT_SECONDS / 2
        seconds = self._seconds + self._expected * half
        begun = self._begun + self._expected * most / 2
        return min(most, MAX_WAIT_SECONDS * begun / seconds)
