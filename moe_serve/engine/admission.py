"""Whether one more HTTP request may wait for the engines: one front-end's books of what has not begun. Pure.

Requests take turns at the engines (engine/turns.py), so what is before a newcomer is of each other request at most as
much as it brings itself: a batch of thousands does not keep a short request out, but another such batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moe_serve.base.errors import Overloaded

ROUNDS = 2
"""Rounds of full engines that may wait. An answer of a few hundred tokens takes about 15 s on a busy server."""
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

    def __init__(self, limits: QueueLimits, *, room: Callable[[], EngineRoom], piece: int) -> None:
        """`piece`: tokens that a request computes before it is somebody else's turn (max_num_batched_tokens)."""
        self._limits, self._room, self._piece = limits, room, piece
        self._places: set[Place] = set()

    def admit(self, num_seqs: int, num_tokens: int) -> Place:
        """A place for a request of so many sequences and prompt tokens. Raises Overloaded."""
        place = Place(self)
        place.settle(num_seqs, num_tokens)
        return place

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun."""
        return sum(place.num_seqs for place in self._places)

    def check(self, num_seqs: int, num_tokens: int, *, asking: Place | None = None) -> None:
        """Raise Overloaded unless so much more may wait. `asking` is not in its own way."""
        others = [place for place in self._places if place is not asking]
        room = self._room()
        max_requests, max_tokens = self._limits.of(room)
        # Who finds a place in a step does not wait.
        free = max(0, room.num_seqs - sum(place.num_begun for place in others))
        ahead = sum(min(place.num_seqs, max(num_seqs, 1)) for place in others) - free
        if ahead >= max_requests:
            raise Overloaded(
                f"{ahead} requests wait before this one, of at most {max_requests} (server option "
                "--max-num-queued-reqs)",
                retry_after=RETRY_SECONDS,
                reason="queued_reqs",
            )
        tokens = sum(min(place.num_tokens, max(num_tokens, self._piece)) for place in others)
        if tokens and tokens >= max_tokens:
            raise Overloaded(
                f"prompts of {tokens} tokens wait before this one, of at most {max_tokens} (server option "
                "--max-num-queued-tokens)",
                retry_after=RETRY_SECONDS,
                reason="queued_tokens",
            )

    def enter(self, place: Place) -> None:
        self._places.add(place)

    def leave(self, place: Place) -> None:
        self._places.discard(place)


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

    def finished(self) -> None:
        """A sequence that began is over."""
        self.num_begun -= 1

    def close(self) -> None:
        """The request is over."""
        self._admission.leave(self)


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
