"""Whether one more HTTP request may wait for the engines: the books of what has not begun. Pure.

The front-ends of one launcher have limits together: each has its own books, and sees the others' on the board
(engine/board.py). Two that look at the same moment do not see each other, so of N front-ends N - 1 requests may be
admitted beyond a limit, and no more.

Requests take turns at the engines (engine/turns.py), so what is before a newcomer is of each other request at most as
much as it brings itself: a batch of thousands does not keep a short request out, but another such batch.

Where no option says how much may wait, it is at most two rounds of full engines, and less while rounds take so long
that the last would wait longer than MAX_WAIT_SECONDS (engine/pace.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moe_serve.base.errors import Overloaded, RefusalReason
from moe_serve.engine.board import NoticeBoard
from moe_serve.engine.pace import MAX_WAIT_SECONDS, Pace

ROUNDS = 2
"""Rounds of full engines that may wait at most."""
BUSY_SECONDS = 1.0
"""Who waits longer waits for others, and not for its own prompt to be computed."""
LEAST_REQUESTS = 64
RETRY_SECONDS = 5
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class EngineRoom:
    """What a front-end's engines hold at once: sequences of a step, and tokens of their KV caches."""

    num_seqs: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`requests` and `tokens` that may wait, as the options say; None: worked out from the engines' room."""

    requests: int | None = None
    tokens: int | None = None

    def of(self, room: EngineRoom) -> tuple[int, int]:
        """Both as numbers."""
        requests = max(ROUNDS * room.num_seqs, LEAST_REQUESTS) if self.requests is None else self.requests
        tokens = ROUNDS * room.num_tokens if self.tokens is None else self.tokens
        return requests, tokens


class Admission:
    """`admit` before any work is done for a request, with what it probably brings; its Place tells the rest."""

    def __init__(
        self,
        limits: QueueLimits,
        *,
        room: Callable[[], EngineRoom],
        piece: int,
        clock: Callable[[], float],
        board: NoticeBoard | None = None,
    ) -> None:
        """`piece`: tokens that a request computes before it is somebody else's turn (max_num_batched_tokens).

        `clock` is the same for all on the `board`.
        """
        self._limits, self._room, self._piece, self._clock = limits, room, piece, clock
        self._waiting: dict[Place, float] = {}  # since when; oldest first
        self._num_begun = 0
        self._requests, self._tokens = Pace(clock()), Pace(clock())
        self._board = NoticeBoard.alone() if board is None else board
        self._shown: dict[Place, tuple[int, int]] = {}
        self._others_begun = self._board.others_begun

    def admit(self, num_seqs: int, num_tokens: int) -> Place:
        """A place for a request of so many sequences and prompt tokens. Raises Overloaded."""
        place = Place(self)
        place.settle(num_seqs, num_tokens)
        return place

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, those of other front-ends on the board included."""
        return sum(place.num_seqs for place in self._waiting) + self._board.others_num_waiting

    def check(self, num_seqs: int, num_tokens: int, *, asking: Place | None = None) -> None:
        """Raise Overloaded unless so much more may wait. `asking` is not in its own way."""
        busy = self._pass_time()
        others = [place for place in self._waiting if place is not asking]
        room = self._room()
        max_requests, max_tokens = self._limits.of(room)
        piece = max(num_tokens, self._piece)
        elsewhere = self._board.others_waiting(seqs=max(num_seqs, 1), tokens=piece)
        before = elsewhere[0] + sum(min(place.num_seqs, max(num_seqs, 1)) for place in others)
        # Who finds a place in a step does not wait.
        ahead = before - max(0, room.num_seqs - self._num_begun - self._board.others_running)
        if ahead >= max_requests:
            raise _overloaded("queued_reqs", f"{ahead} requests wait before this one, of at most {max_requests}")
        tokens = elsewhere[1] + sum(min(place.num_tokens, piece) for place in others)
        if tokens and tokens >= max_tokens:
            raise _overloaded(
                "queued_tokens", f"prompts of {tokens} tokens wait before this one, of at most {max_tokens}"
            )
        if busy and self._limits.requests is None:
            _check_wait("queued_reqs", before, max(1, self._requests.fitting(max_requests)), "requests")
        if busy and self._limits.tokens is None:
            fitting = max(self._piece, self._tokens.fitting(max_tokens))
            _check_wait("queued_tokens", tokens, fitting, "tokens of prompts")

    def enter(self, place: Place) -> None:
        self._waiting.setdefault(place, self._clock())
        self._show(place)

    def leave(self, place: Place) -> None:
        self._pass_time()
        self._waiting.pop(place, None)
        self._num_begun -= place.num_begun
        self._show(place)

    def began(self, place: Place, num_tokens: int) -> None:
        """A sequence of a place, with so long a prompt, waits no more."""
        if self._pass_time():
            self._requests.began(1)
            self._tokens.began(num_tokens)
        self._num_begun += 1
        self._board.began(num_tokens)
        if place.num_seqs <= 0:
            self._waiting.pop(place, None)
        self._show(place)

    def finished(self) -> None:
        """A sequence that began is over."""
        self._num_begun -= 1
        self._say()

    def _show(self, place: Place) -> None:
        """The others see what of this place waits."""
        if (shown := self._shown.pop(place, None)) is not None:
            self._board.waits(*shown, sign=-1)
        if place in self._waiting:
            self._shown[place] = place.num_seqs, place.num_tokens
            self._board.waits(place.num_seqs, place.num_tokens)
        self._say()

    def _say(self) -> None:
        self._board.says(oldest=next(iter(self._waiting.values()), 0.0), running=self._num_begun)

    def _pass_time(self) -> bool:
        """Whether somebody waits for others; and so it has been since the last call."""
        now = self._clock()
        oldest = min(next(iter(self._waiting.values()), now), self._board.others_oldest or now)
        busy = now - oldest > BUSY_SECONDS
        for pace in (self._requests, self._tokens):
            pace.pass_time(now, busy=busy)
        self._hear_others(busy)
        return busy

    def _hear_others(self, busy: bool) -> None:
        """What began elsewhere is at the same engines."""
        before, now = self._others_begun, self._board.others_begun
        self._others_begun = now
        if busy and now != before:
            self._requests.began(now.num_seqs - before.num_seqs)
            self._tokens.began(now.num_tokens - before.num_tokens)


class Place:
    """One HTTP request in the books. Close it always."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.num_seqs = 0
        self.num_tokens = 0
        self.num_begun = 0

    def settle(self, num_seqs: int, num_tokens: int) -> None:
        """Now it is known better what the request brings; Overloaded if that is too much after all."""
        self._admission.check(num_seqs, num_tokens, asking=self)
        self.num_seqs, self.num_tokens = num_seqs, num_tokens
        self._admission.enter(self)

    def began(self, num_tokens: int) -> None:
        """A sequence with a prompt of so many tokens gave its first token."""
        self.num_seqs -= 1
        self.num_tokens -= num_tokens
        self.num_begun += 1
        self._admission.began(self, num_tokens)

    def finished(self) -> None:
        """A sequence that began is over."""
        self.num_begun -= 1
        self._admission.finished()

    def close(self) -> None:
        """The request is over."""
        self._admission.leave(self)
        self.num_seqs = self.num_tokens = self.num_begun = 0


def _check_wait(reason: RefusalReason, before: int, fitting: float, what: str) -> None:
    if before > fitting:
        raise _overloaded(
            reason,
            f"{before} {what} wait before this one, and about {fitting:.0f} begin in {MAX_WAIT_SECONDS:g} s; so "
            "many may wait where no number is given",
        )


def _overloaded(reason: RefusalReason, what: str) -> Overloaded:
    option = {"queued_reqs": "--max-num-queued-reqs", "queued_tokens": "--max-num-queued-tokens"}[reason]
    return Overloaded(f"{what} (server option {option})", retry_after=RETRY_SECONDS, reason=reason)


@contextmanager
def closed_on_error(place: Place) -> Iterator[None]:
    """Until an answer has taken the place over, whatever goes wrong gives it back."""
    try:
        yield
    except BaseException:
        place.close()
        raise


def guess_tokens(num_characters: int) -> int:
    """About how many tokens a text has, before anybody has spent time on it."""
    return num_characters // CHARACTERS_PER_TOKEN
