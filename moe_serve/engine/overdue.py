"""Requests of which a front-end hears nothing: when to ask their engine, and when to give them up. Pure bookkeeping.

An engine says nothing of a request that waits in its queue, so silence proves nothing, and no wait is too long. But it
answers between two steps, in order with everything else on the line: what it does not know then is lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice, takewhile

from moe_serve.base.engine_messages import HeldAnswer, HeldAsk

QUIET_SECONDS = 5.0
LOOK_SECONDS = 1.0
MOST_ASKED = 1000
"""In one question; the others come with the next look."""


@dataclass(slots=True)
class _Wait:
    """Nothing has been heard `since` then of a request that was `sent` then."""

    sent: float
    since: float


@dataclass(slots=True)
class _Rank:
    """`waits` by request, those of which nothing was heard for longest first. `pending` question, `asked` then.

    `computed` as it was told last, first so at `moved`.
    """

    waits: OrderedDict[str, _Wait] = field(default_factory=OrderedDict)
    pending: HeldAsk | None = None
    asked: float = 0.0
    computed: int = -1
    moved: float = 0.0


class Overdue:
    """Of one front-end. For each request: `sent`, `heard` with its events, `ended`. `look` every LOOK_SECONDS.

    A request is lost if its engine does not know it; if the engine has not answered for `limit` seconds; or if it has
    answered, but computed nothing for so long. `limit` must be more than a turn of an engine may take.

    Time in which nobody looked, because this process did not run, counts for nobody.
    """

    def __init__(self, *, clock: Callable[[], float], limit: float, quiet: float = QUIET_SECONDS) -> None:
        self._clock = clock
        self._limit = limit
        self._quiet = quiet
        self._looked = clock()
        self._now = 0.0
        self._number = 0
        self._ranks: dict[int, _Rank] = {}
        self._rank_of: dict[str, int] = {}

    def sent(self, request_id: str, rank: int) -> None:
        """A request is on its way to `rank`."""
        self._rank_of[request_id] = rank
        self._ranks.setdefault(rank, _Rank()).waits[request_id] = _Wait(self._now, self._now)

    def heard(self, request_id: str) -> None:
        """An event came, or word that it waits. Unknown requests are ignored."""
        rank = self._rank_of.get(request_id)
        if rank is not None:
            waits = self._ranks[rank].waits
            waits[request_id].since = self._now
            waits.move_to_end(request_id)

    def ended(self, request_id: str) -> None:
        """Nothing more is to come. Unknown requests are ignored."""
        rank = self._rank_of.pop(request_id, None)
        if rank is not None:
            del self._ranks[rank].waits[request_id]

    def line_lost(self, rank: int) -> None:
        """What was asked there will not be answered."""
        if rank in self._ranks:
            self._ranks[rank].pending = None

    def look(self) -> tuple[dict[int, HeldAsk], dict[str, str]]:
        """What to ask which rank; and which requests are lost, with the reason."""
        before, self._looked = self._looked, self._clock()
        self._now += min(self._looked - before, 2 * LOOK_SECONDS)
        asks: dict[int, HeldAsk] = {}
        lost: dict[str, str] = {}
        for rank, books in self._ranks.items():
            if books.pending is None:
                quiet = takewhile(lambda each: self._now - each[1].since >= self._quiet, books.waits.items())
                if names := [name for name, _ in islice(quiet, MOST_ASKED)]:
                    asks[rank] = self._ask(books, names)
            elif self._now - books.asked > self._limit:
                lost |= self._give_up(rank, books)
        return asks, lost

    def answered(self, answer: HeldAnswer) -> dict[str, str]:
        """Which requests are lost, with the reason. An answer to no question of now is ignored."""
        books = self._ranks.get(answer.dp)
        ask = None if books is None else books.pending
        if books is None or ask is None or ask.number != answer.number:
            return {}
        books.pending = None
        if books.computed != answer.computed:
            books.computed, books.moved = answer.computed, self._now
        unknown = set(answer.unknown)
        lost: dict[str, str] = {}
        for name in ask.request_ids:
            wait = books.waits.get(name)
            if wait is None:
                continue
            if name in unknown:
                lost[name] = f"DP rank {answer.dp} does not know this request any more; send it once more"
            elif self._now - max(books.moved, wait.sent) > self._limit:
                lost[name] = f"DP rank {answer.dp} has this request, but has computed nothing for {self._bound()}"
            else:
                self.heard(name)
        return lost

    def _ask(self, books: _Rank, names: list[str]) -> HeldAsk:
        self._number += 1
        books.pending, books.asked = HeldAsk(self._number, names), self._now
        return books.pending

    def _give_up(self, rank: int, books: _Rank) -> dict[str, str]:
        """An engine that does not answer: those of which nothing else came either."""
        books.pending = None
        why = f"DP rank {rank} has not said whether it has this request for {self._bound()}"
        silent = takewhile(lambda each: each[1].since <= books.asked, books.waits.items())
        return {name: why for name, _ in silent}

    def _bound(self) -> str:
        return f"{self._limit:g} s (a multiple of --step-timeout-seconds)"
