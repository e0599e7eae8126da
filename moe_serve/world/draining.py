"""A world that was asked to end: until when it may take, and what has not finished then. No I/O."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moe_serve.base.messages import Stop
from moe_serve.world.members import Member, left_behind


@dataclass(frozen=True, slots=True)
class Draining:
    """`node` was asked to, and its front-ends finish what they have; other nodes go on taking requests."""

    node: str
    timeout: float
    until: float

    def judge(self, members: Collection[Member], now: float) -> tuple[Stop | None, str]:
        """How the world ends now, if it does, and a line for the log, if there is something to say.

        Every rank of every step is needed: a node cannot go without the others, and must not while they have work.
        """
        if now >= self.until:
            within = f"within --shutdown-timeout ({self.timeout:g} s)"
            stop = Stop(f"what had not finished {within} was ended", 0, self.node)
            return stop, f"not finished {within}: {left_behind(members)}"
        servers = [each for each in members if each.hello.role == "api" and not each.leaving]
        engines = [each for each in members if each.hello.role == "engine"]
        left = bool(servers) and all(each.hello.node != self.node for each in servers)
        idle = all(each.unfinished is not None and each.unfinished.num_requests == 0 for each in engines)
        return (Stop("asked to stop, and nobody had work", 0, self.node), "") if left and idle else (None, "")
