"""How many requests may wait: what is refused, and what is never in the way."""

from __future__ import annotations

import pytest

from moe_serve.base.errors import Overloaded
from moe_serve.engine.admission import Admission, EngineRoom, QueueLimits, closed_on_error, guess_tokens


def admission(requests: int | None = None, tokens: int | None = None, *, seqs: int = 4, kv: int = 1000) -> Admission:
    return Admission(QueueLimits(requests, tokens), room=lambda: EngineRoom(seqs, kv), piece=100)


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
