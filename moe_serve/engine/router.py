"""Which data-parallel rank gets the next request of one front-end. Pure bookkeeping: no sockets, no torch.

What this front-end sent is counted exactly, from its own events, and so is what the others of its launcher sent
(engine/board.py). Engines' reports only refine the picture (free KV blocks; what front-ends elsewhere sent), and only
while they are fresh: a report that is late or wrong can make a rank
look emptier or, if other front-ends share the engines, fuller than it is, but not for longer than it is fresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_serve.base.engine_messages import LoadReport
from moe_serve.base.errors import RequestError
from moe_serve.engine.board import NoticeBoard

log = logging.getLogger(__name__)

FRESH_SECONDS = 5.0
FRESH_STEPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one engine can take; `num_blocks` is None as long as no engine has said it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What a rank has to do: prompt tokens still to compute, sequences, KV blocks in use or soon needed."""

    queued_tokens: int
    num_seqs: int
    used_blocks: int


@dataclass(frozen=True, slots=True)
class RankChoice:
    """`costs[r]` of rank r, in steps' worth of work; `short[r]` it has too few free KV blocks for this prompt."""

    rank: int
    reason: str
    costs: tuple[float, ...] = ()
    short: tuple[bool, ...] = ()

    def __str__(self) -> str:
        ranks = (
            f"{rank}: {cost:.3f}{' no KV' if short else ''}"
            for rank, (cost, short) in enumerate(zip(self.costs, self.short, strict=True))
        )
        return f"DP rank {self.rank} ({self.reason}) of {{{', '.join(ranks)}}}"


def choose_rank(
    loads: Sequence[RankLoad],
    num_tokens: int,
    capacity: Capacity,
    start: int = 0,
    *,
    among: Sequence[int] | None = None,
) -> RankChoice:
    """The cheapest rank with room for a prompt of `num_tokens`; among equals the first from `start` on.

    Of all ranks, or of those in `among`.

    The cost adds three shares: queued prompt tokens of a step's budget, sequences of a step's slots, KV blocks in
    use of all blocks. So a prompt weighs by its length until it is computed, then as a slot and its KV.
    """
    need = _blocks(num_tokens + 1, capacity.block_size)
    costs = tuple(_cost(load, capacity) for load in loads)
    short = tuple(capacity.num_blocks is not None and load.used_blocks + need > capacity.num_blocks for load in loads)
    turns = [(start + offset) % len(loads) for offset in range(len(loads))]
    allowed = None if among is None else set(among)
    order = [rank for rank in turns if allowed is None or rank in allowed]
    best = min(order, key=lambda rank: (short[rank], costs[rank]))
    equals = [rank for rank in order if (short[rank], costs[rank]) == (short[best], costs[best])]
    if all(short[rank] for rank in order):
        reason = "no rank has free KV blocks, this has least to do"
    elif len(equals) > 1:
        reason = f"next of {len(equals)} equals"
    else:
        reason = "least to do" + (" among those with free KV blocks" if any(short[rank] for rank in order) else "")
    return RankChoice(best, reason, costs, short)


@dataclass(slots=True)
class _Sent:
    rank: int
    num_tokens: int  # prompt and answer so far
    queued: int  # prompt tokens not known to be computed


@dataclass(slots=True)
class _Own:
    """This front-end's requests on one rank, summed."""

    queued_tokens: int = 0
    num_seqs: int = 0
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class _Sighting:
    """A report, when it was first seen, and what to add to the books because of it.

    `extra_blocks` is negative where requests share prefixes and so hold less than the sum of their blocks.
    """

    report: LoadReport
    seen_at: float
    extra_tokens: int
    extra_seqs: int
    extra_blocks: int


class Balancer:
    """One front-end's books. For each request: `choose`, `sent`, `progressed` with its events, `finished`.

    `shared` says that other front-ends send to the same engines; it may change. Alone, a rank cannot be fuller than
    this front-end has made it, whatever a report says. This front-end `serves` these ranks only (None: all).

    What those on the `board` have sent counts as its own; each of them begins with another rank.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        clock: Callable[[], float],
        max_num_seqs: int = 128,
        max_num_batched_tokens: int = 2048,
        block_size: int = 16,
        shared: bool = False,
        serves: Sequence[int] | None = None,
        board: NoticeBoard | None = None,
    ) -> None:
        self._limits = (max_num_seqs, max_num_batched_tokens)
        self._block_size = block_size
        self.shared = shared
        self._serves = serves
        self._clock = clock
        self._own = [_Own() for _ in range(num_ranks)]
        self._sent: dict[str, _Sent] = {}
        self._sightings: dict[int, _Sighting] = {}
        self._board = NoticeBoard.alone(num_ranks) if board is None else board
        self._start = self._board.slot % max(1, num_ranks)

    def choose(self, num_tokens: int, reports: Mapping[int, LoadReport], *, pinned: int | None = None) -> int:
        """The rank for a prompt of `num_tokens`; `reports` holds the newest report of each rank that sent one."""
        choice = self.decide(num_tokens, reports, pinned=pinned)
        log.debug("a prompt of %d tokens goes to %s", num_tokens, choice)
        return choice.rank

    def decide(self, num_tokens: int, reports: Mapping[int, LoadReport], *, pinned: int | None = None) -> RankChoice:
        """As choose(), with the reason. Raises RequestError for a rank that is not served."""
        self._look_at(reports)
        if pinned is not None:
            if not 0 <= pinned < len(self._own):
                raise RequestError(
                    f"X-data-parallel-rank must lie in [0, {len(self._own)}), below data_parallel_size, not {pinned}",
                    param="X-data-parallel-rank",
                )
            if self._serves is not None and pinned not in self._serves:
                raise RequestError(
                    f"X-data-parallel-rank must be one of {', '.join(map(str, self._serves))}, the data-parallel ranks "
                    f"that this front-end serves, not {pinned}",
                    param="X-data-parallel-rank",
                )
            return RankChoice(pinned, "pinned")
        blocks = [sighting.report.num_blocks for sighting in self._sightings.values()]
        capacity = Capacity(
            max_num_seqs=self._limits[0],
            max_num_batched_tokens=self._limits[1],
            block_size=self._block_size,
            num_blocks=max(blocks, default=0) or None,
        )
        loads = self._loads()
        choice = choose_rank(loads, num_tokens, capacity, self._start, among=self._serves)
        self._start = (choice.rank + 1) % len(self._own)
        return choice

    def sent(self, request_id: str, rank: int, num_tokens: int) -> None:
        """A prompt of `num_tokens` is on its way to `rank`."""
        self._sent[request_id] = _Sent(rank, num_tokens, num_tokens)
        own = self._own[rank]
        own.queued_tokens += num_tokens
        own.num_seqs += 1
        own.blocks += _blocks(num_tokens, self._block_size)
        self._show(rank)

    def progressed(self, request_id: str, num_tokens: int) -> None:
        """So many new tokens came, so the prompt is computed. Unknown requests are ignored."""
        sent = self._sent.get(request_id)
        if sent is not None:
            own = self._own[sent.rank]
            own.queued_tokens -= sent.queued
            sent.queued = 0
            own.blocks -= _blocks(sent.num_tokens, self._block_size)
            sent.num_tokens += num_tokens
            own.blocks += _blocks(sent.num_tokens, self._block_size)
            self._show(sent.rank)

    def on_rank(self, rank: int) -> list[str]:
        """Requests that were sent there and are not finished."""
        return [request_id for request_id, sent in self._sent.items() if sent.rank == rank]

    def finished(self, request_id: str) -> None:
        """The request ended or was given up. Unknown requests are ignored."""
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            own = self._own[sent.rank]
            own.queued_tokens -= sent.queued
            own.num_seqs -= 1
            own.blocks -= _blocks(sent.num_tokens, self._block_size)
            self._show(sent.rank)

    def _show(self, rank: int) -> None:
        own = self._own[rank]
        self._board.sent(rank, (own.queued_tokens, own.num_seqs, own.blocks))

    def _ours(self) -> list[_Own]:
        """What all on the board have sent to each rank."""
        if self._board.num_slots == 1:
            return self._own
        return [
            _Own(own.queued_tokens + queued, own.num_seqs + seqs, own.blocks + blocks)
            for own, (queued, seqs, blocks) in zip(self._own, self._board.others_sent(), strict=True)
        ]

    def _look_at(self, reports: Mapping[int, LoadReport]) -> None:
        """Note new reports. Requests go out only after this, so each is compared with what it could know of."""
        for rank, ours in enumerate(self._ours()):
            report, known = reports.get(rank), self._sightings.get(rank)
            if report is not None and (known is None or known.report is not report):
                self._sightings[rank] = self._compare(report, ours)

    def _compare(self, report: LoadReport, own: _Own) -> _Sighting:
        tokens = max(0, report.waiting_tokens - own.queued_tokens)
        seqs = max(0, report.num_running + report.num_waiting - own.num_seqs)
        # Queued prompts may not hold their blocks yet, or not all.
        held = report.num_blocks - report.free_blocks + _blocks(own.queued_tokens, self._block_size)
        blocks = held - own.blocks
        if not self.shared:
            tokens, seqs, blocks = 0, 0, min(0, blocks)
        return _Sighting(report, self._clock(), tokens, seqs, blocks)

    def _loads(self) -> list[RankLoad]:
        now, newest = self._clock(), max((seen.report.step for seen in self._sightings.values()), default=0)
        return [self._load(rank, own, now, newest) for rank, own in enumerate(self._ours())]

    def _load(self, rank: int, own: _Own, now: float, newest_step: int) -> RankLoad:
        seen = self._sightings.get(rank)
        if seen is None or not _fresh(seen, now, newest_step):
            return RankLoad(own.queued_tokens, own.num_seqs, own.blocks)
        return RankLoad(
            own.queued_tokens + seen.extra_tokens,
            own.num_seqs + seen.extra_seqs,
            max(0, own.blocks + seen.extra_blocks),
        )


def _fresh(sighting: _Sighting, now: float, newest_step: int) -> bool:
    """Ranks step together, so a report that lags behind the others' steps is old whenever it came."""
    return now - sighting.seen_at <= FRESH_SECONDS and newest_step - sighting.report.step <= FRESH_STEPS


def _cost(load: RankLoad, capacity: Capacity) -> float:
    return (
        load.queued_tokens / capacity.max_num_batched_tokens
        + load.num_seqs / capacity.max_num_seqs
        + (load.used_blocks / capacity.num_blocks if capacity.num_blocks else 0.0)
    )


def _blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
