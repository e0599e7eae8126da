"""What an engine says: events to whoever asked, how it stands to all front-ends, and what is left of a drain."""

from __future__ import annotations

import time
from collections.abc import Sequence

from moe_serve.base.engine_messages import Events, HeldAnswer, HeldAsk, TokenEvent
from moe_serve.base.messages import Unfinished
from moe_serve.engine.dp import DPRank
from moe_serve.engine.owners import Owners
from moe_serve.engine.sockets import FrontendSockets
from moe_serve.world.link import Link

REPORT_SECONDS = 0.5
UNFINISHED_NAMED = 8


class Reporting:
    """Of the engine of one DP rank; its loop thread owns it."""

    def __init__(self, dp: int, owners: Owners, sockets: FrontendSockets, link: Link) -> None:
        self._dp = dp
        self._owners = owners
        self._sockets = sockets
        self._link = link
        self._reported = 0.0
        self._draining = False

    def tell(self, events: list[TokenEvent], rank: DPRank, frontends: Sequence[str]) -> None:
        """After a turn. Each front-end gets its own requests' events, and all of them hear now and then how we stand.

        By time, since a request may end without an event, and dummy steps have none; and when this rank falls asleep.
        """
        by_owner, now = self._owners.sort(events), time.monotonic()
        if rank.naps.asleep or now - self._reported > REPORT_SECONDS:
            self._reported = now
            self._say_unfinished(rank)
            by_owner |= {address: by_owner.get(address, []) for address in frontends}
        if by_owner:
            report = rank.report()
            for owner, own in by_owner.items():
                self._sockets.send(owner, Events(self._dp, own, report))

    def refuse(self, address: str, request_id: str, why: str, rank: DPRank) -> None:
        """A request that cannot be served."""
        refusal = TokenEvent(request_id=request_id, token_ids=[], finish_reason="error", error=why)
        self._sockets.send(address, Events(self._dp, [refusal], rank.report()))

    def answer(self, address: str, ask: HeldAsk, rank: DPRank) -> None:
        """Which of these requests of a front-end are not here any more. Their last events were sent before."""
        knows = rank.core.scheduler.knows
        unknown = [name for name in ask.request_ids if not (self._owners.has(name, address) and knows(name))]
        report = rank.report()
        computed = report.steps - report.dummy_steps
        self._sockets.send(address, HeldAnswer(dp=self._dp, number=ask.number, unknown=unknown, computed=computed))

    def drain(self, rank: DPRank) -> None:
        """From now on the coordinator hears what is unfinished here, so that it can say what it had to end."""
        self._draining = True
        self._say_unfinished(rank)

    def _say_unfinished(self, rank: DPRank) -> None:
        if self._draining:
            left = rank.core.scheduler.unfinished
            self._link.send(Unfinished(len(left), left[:UNFINISHED_NAMED]))
