"""What the front-ends of one launcher tell each other, without a word: a piece of memory that all of them see. Pure.

Each has a slot that only itself writes; everybody reads all of them. What stands there is true at the moment it is
read, so neither a slow front-end nor a stopped one keeps anybody waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from moe_serve.base.engine_messages import LoadReport

Numbers = npt.NDArray[np.float64]
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


class NoticeBoard:
    """Of `num_slots` front-ends, this one being number `slot`, and the DP ranks that they send to.

    `memory` of board_bytes(), zero at first. Numbers are float64: whole ones are exact up to 2^53.
    """

    def __init__(self, memory: memoryview, *, num_slots: int, slot: int, num_ranks: int) -> None:
        size = _slot_numbers(num_ranks)
        self.num_slots, self.slot = num_slots, slot
        self._num_ranks = num_ranks
        self._own = memory.cast("B").cast("d")[slot * size : (slot + 1) * size]
        self._all = np.frombuffer(memory, np.float64).reshape(num_slots, size)

    @classmethod
    def alone(cls, num_ranks: int = 0) -> NoticeBoard:
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
        if self.num_slots == 1:
            return 0, 0
        numbers = self._others(SEQS, QUEUE)
        return _at_most(numbers[: TOKENS - SEQS], seqs), _at_most(numbers[TOKENS - SEQS :], tokens)

    @property
    def others_num_waiting(self) -> int:
        """Sequences that wait elsewhere, however many of one request."""
        return int(self._others(SEQS, TOKENS)[1::2].sum())

    @property
    def others_running(self) -> int:
        return int(self._others(RUNNING, RUNNING + 1)[0])

    @property
    def others_oldest(self) -> float | None:
        """Since when the oldest request elsewhere waits; None if none does."""
        if self.num_slots == 1:
            return None
        since = [float(each) for place, each in enumerate(self._all[:, OLDEST]) if each and place != self.slot]
        return min(since, default=None)

    @property
    def others_begun(self) -> Begun:
        num_seqs, num_tokens = self._others(BEGUN_SEQS, BEGUN_TOKENS + 1)
        return Begun(int(num_seqs), int(num_tokens))

    # What was sent to each rank and is not finished: engine/router.py.

    def sent(self, rank: int, load: Sequence[int]) -> None:
        """So much of this front-end's is at `rank`: queued tokens, sequences, blocks."""
        start = QUEUE + rank * SENT
        for place, value in enumerate(load):
            self._own[start + place] = value

    def others_sent(self) -> list[list[int]]:
        """As `sent`, of all others together, for each rank."""
        numbers = self._others(QUEUE, QUEUE + self._num_ranks * SENT)
        found: list[list[int]] = numbers.astype(np.int64).reshape(-1, SENT).tolist()
        return found

    # What engines reported, each front-end at another moment.

    def reported(self, rank: int, report: LoadReport) -> None:
        """The newest that this front-end was told."""
        start = self._report(rank)
        for place, name in enumerate((*GAUGES, *COUNTERS)):
            self._own[start + place] = getattr(report, name)

    def knows(self, rank: int) -> bool:
        """Whether any front-end was told of a turn of it."""
        return bool(self._all[:, self._report(rank) + len(GAUGES)].any())

    def newest(self, rank: int, report: LoadReport) -> LoadReport:
        """What this front-end was told last, brought up to what any was told. No counter ever goes down."""
        if self.num_slots == 1:
            return report
        told = self._all[:, self._report(rank) :][:, :REPORT].copy()
        steps = told[:, len(GAUGES)]
        latest = self.slot if steps[self.slot] == steps.max() else int(steps.argmax())
        known = dict(zip(GAUGES, told[latest].tolist(), strict=False))
        known |= dict(zip(COUNTERS, told[:, len(GAUGES) :].max(axis=0).tolist(), strict=True))
        return msgspec.structs.replace(
            report, **{name: value if name in SECONDS else int(value) for name, value in known.items()}
        )

    def _report(self, rank: int) -> int:
        return QUEUE + self._num_ranks * SENT + rank * REPORT

    def _others(self, start: int, stop: int) -> Numbers:
        """These numbers, summed over all slots but this one's."""
        if self.num_slots == 1:
            return np.zeros(stop - start)
        numbers = self._all[:, start:stop]
        summed: Numbers = numbers[: self.slot].sum(axis=0) + numbers[self.slot + 1 :].sum(axis=0)
        return summed


def board_bytes(num_slots: int, num_ranks: int) -> int:
    """How much memory a board takes."""
    return num_slots * _slot_numbers(num_ranks) * NUMBER_BYTES


def _slot_numbers(num_ranks: int) -> int:
    return QUEUE + num_ranks * (SENT + REPORT)


def _class_of(size: int) -> int:
    """Sizes of 2^(c - 1) up to below 2^c are of class c."""
    return min(max(size, 0).bit_length(), CLASSES - 1)


def _at_most(classes: Numbers, limit: int) -> int:
    """Sum over requests of their size or `limit`, whichever is less, from (how many, sum of sizes) of each class."""
    return int(np.minimum(classes[1::2], classes[::2] * limit).sum())
