"""What the front-ends of one launcher tell each other, without a word: a piece of memory that all of them see. Pure.

Each has a slot that only itself writes; everybody reads all of them. What stands there is true at the moment it is
read, so neither a slow front-end nor a stopped one keeps anybody waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from moe_serve.base.engine_messages import LoadReport

NUMBER_BYTES = 8
CLASSES = 40
"""Of the size of what waits, by powers of two."""
GAUGES = ("num_running", "num_waiting", "waiting_tokens", "free_blocks")
COUNTERS = (
    "step",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "steps",
    "dummy_steps",
    "naps",
    "votes",
    "padding_tokens",
    "vote_seconds",
    "all2all_seconds",
)
SECONDS = frozenset({"vote_seconds", "all2all_seconds"})
OLDEST, RUNNING, BEGUN_SEQS, BEGUN_TOKENS, SEQS = range(5)
TOKENS = SEQS + 2 * CLASSES
QUEUE = TOKENS + 2 * CLASSES
SENT = 3
REPORT = len(GAUGES) + len(COUNTERS)


@dataclass(frozen=True, slots=True)
class Begun:
    """Of what front-ends had waiting since they were started: sequences, and tokens of their prompts."""

    num_seqs: int
    num_tokens: int


class Board:
    """Of `num_slots` front-ends, this one being number `slot`, and the DP ranks that they send to.

    `memory` of board_bytes(), zero at first. Numbers are float64: whole ones are exact up to 2^53.
    """

    def __init__(self, memory: memoryview, *, num_slots: int, slot: int, num_ranks: int) -> None:
        numbers, size = memory.cast("B").cast("d"), _slot_numbers(num_ranks)
        self.num_slots, self.slot = num_slots, slot
        self._num_ranks = num_ranks
        self._all = [numbers[place * size : (place + 1) * size] for place in range(num_slots)]
        self._own = self._all[slot]
        self._others = [each for place, each in enumerate(self._all) if place != slot]

    @classmethod
    def alone(cls, num_ranks: int = 0) -> Board:
        """For a front-end that shares it with nobody."""
        return cls(memoryview(bytearray(board_bytes(1, num_ranks))), num_slots=1, slot=0, num_ranks=num_ranks)

    # What waits: engine/admission.py.

    def waits(self, num_seqs: int, num_tokens: int, *, sign: int = 1) -> None:
        """A request here begins to wait with so much, or with `sign` -1 waits no more."""
        for start, size in ((SEQS, num_seqs), (TOKENS, num_tokens)):
            place = start + 2 * _class_of(size)
            self._own[place] += sign
            self._own[place + 1] += sign * size

    def says(self, *, oldest: float, running: int) -> None:
        """Since when the oldest request here waits (0: none does), and how many sequences run."""
        self._own[OLDEST], self._own[RUNNING] = oldest, running

    def began(self, num_tokens: int) -> None:
        """A sequence here, with so long a prompt, waits no more."""
        self._own[BEGUN_SEQS] += 1
        self._own[BEGUN_TOKENS] += num_tokens

    def others_waiting(self, *, seqs: int, tokens: int) -> tuple[int, int]:
        """Sequences and prompt tokens that wait elsewhere, of each request at most so many.

        Never less than that; where `seqs` or `tokens` is no power of two, it may be up to twice as much.
        """
        found = [
            sum(_at_most(each[start : start + 2 * CLASSES], limit) for each in self._others)
            for start, limit in ((SEQS, seqs), (TOKENS, tokens))
        ]
        return int(found[0]), int(found[1])

    @property
    def others_num_waiting(self) -> int:
        """Sequences that wait elsewhere, however many of one request."""
        return int(sum(sum(each[SEQS + 1 : TOKENS : 2]) for each in self._others))

    @property
    def others_running(self) -> int:
        return int(self._sum(RUNNING))

    @property
    def others_oldest(self) -> float | None:
        """Since when the oldest request elsewhere waits; None if none does."""
        return min((each[OLDEST] for each in self._others if each[OLDEST]), default=None)

    @property
    def others_begun(self) -> Begun:
        return Begun(int(self._sum(BEGUN_SEQS)), int(self._sum(BEGUN_TOKENS)))

    # What was sent to each rank and is not finished: engine/router.py.

    def sent(self, rank: int, load: Sequence[int]) -> None:
        """So much of this front-end's is at `rank`: queued tokens, sequences, blocks."""
        start = QUEUE + rank * SENT
        for place, value in enumerate(load):
            self._own[start + place] = value

    def others_sent(self, rank: int) -> tuple[int, int, int]:
        """As `sent`, of all others together."""
        start = QUEUE + rank * SENT
        queued, seqs, blocks = (int(self._sum(start + place)) for place in range(SENT))
        return queued, seqs, blocks

    # What engines reported, each front-end at another moment.

    def reported(self, rank: int, report: LoadReport) -> None:
        """The newest that this front-end was told."""
        start = self._report(rank)
        for place, name in enumerate((*GAUGES, *COUNTERS)):
            self._own[start + place] = getattr(report, name)

    def knows(self, rank: int) -> bool:
        """Whether any front-end was told of a turn of it."""
        return any(each[self._report(rank) + len(GAUGES)] for each in self._all)

    def newest(self, rank: int, report: LoadReport) -> LoadReport:
        """What this front-end was told last, brought up to what any was told. No counter ever goes down."""
        if not self._others:
            return report
        start = self._report(rank)
        counters = {
            name: max(each[start + len(GAUGES) + place] for each in self._all) for place, name in enumerate(COUNTERS)
        }
        known = {name: value if name in SECONDS else int(value) for name, value in counters.items()}
        latest = max((self._own, *self._others), key=lambda each: each[start + len(GAUGES)])
        known |= {name: int(latest[start + place]) for place, name in enumerate(GAUGES)}
        return msgspec.structs.replace(report, **known)

    def _report(self, rank: int) -> int:
        return QUEUE + self._num_ranks * SENT + rank * REPORT

    def _sum(self, place: int) -> float:
        return sum(each[place] for each in self._others)


def board_bytes(num_slots: int, num_ranks: int) -> int:
    """How much memory a board takes."""
    return num_slots * _slot_numbers(num_ranks) * NUMBER_BYTES


def _slot_numbers(num_ranks: int) -> int:
    return QUEUE + num_ranks * (SENT + REPORT)


def _class_of(size: int) -> int:
    """Sizes of 2^(c - 1) up to below 2^c are of class c."""
    return min(max(size, 0).bit_length(), CLASSES - 1)


def _at_most(classes: Iterable[float], limit: int) -> float:
    """Sum over requests of their size or `limit`, whichever is less, from (how many, sum of sizes) of each class."""
    numbers = list(classes)
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return sum(min(total, count * limit) for count, total in pairs)
