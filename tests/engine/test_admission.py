"""How many requests may wait: what is refused, and what is never in the way."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from moe_serve.base.errors import Overloaded
from moe_serve.engine.admission import Admission, EngineRoom, Place, QueueLimits, closed_on_error, guess_tokens
from moe_serve.engine.pace import MAX_WAIT_SECONDS


def admission(
    requests: int | None = None,
    tokens: int | None = None,
    *,
    seqs: int = 4,
    kv: int = 1000,
    clock: Callable[[], float] = lambda: 0.0,
) -> Admission:
    return Admission(QueueLimits(requests, tokens), room=lambda: EngineRoom(seqs, kv), piece=100, clock=clock)


def test_as_many_as_the_engines_run_and_as_may_wait_are_admitted_and_no_more() -> None:
    books = admission(requests=3)
    for _ in range(4 + 3):
        books.admit(1, 1)
    with pytest.raises(Overloaded, match=r"3 requests wait .* --max-num-queued-reqs") as caught:
        books.admit(1, 1)
    assert (caught.value.reason, caught.value.retry_after) == ("queued_reqs", 5)


def test_a_request_that_has_begun_or_is_closed_leaves_room_for_another() -> None:
    books = admission(requests=1, seqs=1)
    first, second = books.admit(1, 10), books.admit(1, 10)
    with pytest.raises(Overloaded):
        books.admit(1, 10)
    first.began(10)
    with pytest.raises(Overloaded):
        books.admit(1, 10)
    first.finished()
    books.admit(1, 10)
    second.close()
    books.admit(1, 10)


def test_where_none_may_wait_an_idle_engine_still_serves() -> None:
    books = admission(requests=0, seqs=1)
    books.admit(1, 10)
    with pytest.raises(Overloaded):
        books.admit(1, 10)


def test_a_batch_counts_for_a_short_request_as_one_and_for_another_batch_as_what_it_is() -> None:
    books = admission(requests=100, tokens=10_000)
    books.admit(2048, 50_000)
    books.admit(1, 10)
    with pytest.raises(Overloaded):
        books.admit(2048, 50_000)


def test_prompts_that_wait_have_a_limit_but_one_alone_is_never_too_long() -> None:
    books = admission(tokens=500)
    books.admit(1, 400)
    books.admit(1, 400)
    with pytest.raises(Overloaded, match=r"500 .*--max-num-queued-tokens") as caught:
        books.admit(1, 400)
    assert caught.value.reason == "queued_tokens"
    books.admit(1, 10)  # waits for 100 tokens of each at most
    admission(tokens=500).admit(1, 900)


def test_what_was_guessed_is_settled_once_it_is_known() -> None:
    books = admission(tokens=500)
    books.admit(1, 600)
    place = books.admit(1, guess_tokens(400))
    with pytest.raises(Overloaded), closed_on_error(place):
        place.settle(1, 600)
    assert books.num_waiting == 1


def test_without_options_two_rounds_of_full_engines_may_wait() -> None:
    assert QueueLimits().of(EngineRoom(256, 100_000)) == (512, 200_000)
    assert QueueLimits().of(EngineRoom(2, 100)) == (64, 200)
    assert QueueLimits(7, 8).of(EngineRoom(256, 100_000)) == (7, 8)


# --- how long the admitted wait -------------------------------------------------------------------------------------


@dataclass
class Rush:
    """Requests that arrive evenly at engines which run `places` at a time, `seconds` each on average.

    `seqs` is what the engines say they can run; `places` what fits into their KV cache. `waits` of those admitted.
    """

    seconds: float
    places: int = 64
    seqs: int = 64
    num_tokens: int = 10
    kv: int = 1_000_000
    requests: int | None = None
    now: float = 0.0
    waits: list[float] = field(default_factory=list)
    num_refused: int = 0

    def __post_init__(self) -> None:
        self.books = admission(self.requests, seqs=self.seqs, kv=self.kv, clock=lambda: self.now)
        self._waiting: list[tuple[float, Place]] = []
        self._running: list[tuple[float, int, Place]] = []
        self._chance = random.Random(1)

    def offer(self, rate: float, seconds: float) -> None:
        """So many a second for so long."""
        start, count = self.now, int(rate * seconds)
        for number in range(count):
            self.run_until(start + number / rate)
            try:
                self._waiting.append((self.now, self.books.admit(1, self.num_tokens)))
            except Overloaded:
                self.num_refused += 1
            self._begin()

    def drain(self) -> None:
        """Until nothing is left."""
        while self._running:
            self.run_until(self._running[0][0])

    def run_until(self, when: float) -> None:
        while self._running and self._running[0][0] <= when:
            self.now, _, place = heapq.heappop(self._running)
            place.finished()
            place.close()
            self._begin()
        self.now = when

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self.places:
            since, place = self._waiting.pop(0)
            place.began(self.num_tokens)
            self.waits.append(self.now - since)
            heapq.heappush(self._running, (self.now + self.seconds * self._chance.uniform(0.5, 1.5), id(place), place))


@pytest.mark.parametrize("seconds", [20.0, 25.0, 40.0])
def test_at_three_times_capacity_the_admitted_wait_about_half_a_minute_however_long_answers_take(
    seconds: float,
) -> None:
    rush = Rush(seconds)
    rush.offer(3 * rush.places / seconds, 200)
    rush.drain()
    steady = rush.waits[rush.places * 3 :]
    assert max(steady) < MAX_WAIT_SECONDS * 1.5
    assert max(rush.waits) < MAX_WAIT_SECONDS * 2.1, "the first, before it is known how long answers take"
    assert sorted(steady)[len(steady) // 2] > MAX_WAIT_SECONDS / 2, "nor is anybody refused for nothing"


def test_where_answers_are_short_two_rounds_may_wait() -> None:
    rush = Rush(seconds=5)
    rush.offer(3 * rush.places / 5, 60)
    rush.drain()
    assert max(rush.waits) == pytest.approx(2 * 5, abs=2)


def test_where_the_kv_cache_holds_fewer_than_there_are_places_the_admitted_wait_no_longer() -> None:
    rush = Rush(seconds=20, places=20)
    rush.offer(3 * 20 / 20, 300)
    rush.drain()
    assert max(rush.waits[200:]) < MAX_WAIT_SECONDS * 1.5


def test_prompts_that_take_long_to_compute_count_by_their_tokens() -> None:
    """One place: 2,000 tokens in a second, and the KV caches hold 100,000."""
    rush = Rush(seconds=1, places=1, num_tokens=2000, kv=100_000)
    rush.offer(3, 200)
    rush.drain()
    assert max(rush.waits[120:]) < MAX_WAIT_SECONDS * 1.5


def test_a_number_that_is_given_is_kept_however_long_it_takes() -> None:
    rush = Rush(seconds=40, requests=300)
    rush.offer(3 * rush.places / 40, 200)
    rush.drain()
    assert max(rush.waits) > 3 * 40
    again = Rush(seconds=40, requests=300)
    again.offer(1000, 1)
    assert again.num_refused == 1000 - 64 - 300


def test_what_a_rush_taught_is_forgotten_when_it_is_over() -> None:
    rush = Rush(seconds=100)
    rush.offer(10, 300)
    refused = rush.num_refused
    assert refused
    rush.drain()
    rush.run_until(rush.now + 200)
    rush.offer(1000, (64 + 128) / 1000)
    assert rush.num_refused == refused
