"""Seconds in which the coordinator was stopped itself: nobody else is to blame for them. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_serve.world.members import QUIET_SECONDS, Member

OWN_GAP_SECONDS = 8.0
"""A coordinator that was stopped for so long itself has been given up by all members."""


@dataclass(slots=True)
class OwnTime:
    """`now` as it was last told; `excuse` for members that went while this process was stopped, or ""."""

    now: float | None = None
    excuse: str = ""

    def pass_to(self, now: float, members: Iterable[Member]) -> None:
        """Whoever was silent while nobody listened is not late."""
        gap = 0.0 if self.now is None else now - self.now
        self.now = now
        if gap > OWN_GAP_SECONDS:
            self.excuse = f"the coordinator itself was stopped for {gap:.0f} s, and the others gave it up"
        for known in members if gap > QUIET_SECONDS else ():
            known.heard += gap
