"""What front-ends of one launcher see of each other: limits, loads and reports of all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.engine_messages import LoadReport
from moe_serve.base.errors import Overloaded
from moe_serve.engine.admission import Admission, EngineRoom, QueueLimits
from moe_serve.engine.board import COUNTERS, GAUGES, NoticeBoard, board_bytes
from moe_serve.engine.router import Balancer

NOT_COUNTED = {"num_blocks", "load_seconds"}


def boards(count: int, ranks: int = 2) -> list[NoticeBoard]:
    """As separate processes see them."""
    memory = bytearray(board_bytes(count, ranks))
    return [NoticeBoard(memoryview(memory), num_slots=count, slot=slot, num_ranks=ranks) for slot in range(count)]


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def admissions(count: int, clock: Time, requests: int | None = None, tokens: int | None = None) -> list[Admission]:
    limits = QueueLimits(requests, tokens)
    room = EngineRoom(4, 1000)
    return [Admission(limits, room=lambda: room, piece=128, clock=clock, board=each) for each in boards(count)]


def until_refused(books: Admission) -> None:
    for _ in range(1000):
        books.admit(1, 10)


def balancers(count: int, ranks: int) -> list[Balancer]:
    return [Balancer(ranks, clock=Time(), board=each) for each in boards(count, ranks)]


def test_every_figure_of_a_report_is_passed_on_but_what_never_changes() -> None:
    assert {*GAUGES, *COUNTERS} == set(LoadReport.__struct_fields__) - NOT_COUNTED


def test_a_limit_holds_over_all_front_ends_whoever_is_asked() -> None:
    books = admissions(3, Time(), requests=2)
    for turn in range(4 + 2):
        books[turn % 3].admit(1, 1)
    for each in books:
        with pytest.raises(Overloaded, match=r"2 requests wait .* --max-num-queued-reqs"):
            each.admit(1, 1)


def test_a_limit_of_tokens_holds_over_all_front_ends() -> None:
    one, other = admissions(2, Time(), tokens=300)
    for _ in range(3):
        one.admit(1, 100)
    with pytest.raises(Overloaded, match=r"300 tokens wait .* --max-num-queued-tokens"):
        other.admit(1, 1)


def test_what_begins_or_ends_at_one_front_end_makes_room_at_the_others() -> None:
    one, other = admissions(2, Time(), requests=0)
    places = [one.admit(1, 10) for _ in range(4)]
    with pytest.raises(Overloaded):
        other.admit(1, 10)
    places[0].began(10)
    with pytest.raises(Overloaded):
        other.admit(1, 10)
    places[0].finished()
    mine = other.admit(1, 10)
    places[1].close()
    other.admit(1, 10)
    with pytest.raises(Overloaded):
        one.admit(1, 10)
    mine.close()
    one.admit(1, 10)


@pytest.mark.parametrize(("per_second", "fitting"), [(1, range(27, 37)), (4, range(60, 72))])
def test_where_no_number_is_given_one_learns_the_pace_of_what_begins_at_another(
    per_second: int, fitting: range
) -> None:
    clock = Time()
    one, other = admissions(2, clock)
    waiting = [one.admit(1, 10) for _ in range(20)]
    for _ in range(150):
        clock.now += 1
        other.admit(1, 10).close()
        for _ in range(per_second):
            first = waiting.pop(0)
            first.began(10)
            first.finished()
            first.close()
            waiting.append(one.admit(1, 10))
    with pytest.raises(Overloaded, match="--max-num-queued-reqs"):
        until_refused(other)
    assert other.num_waiting in fitting


@given(
    sizes=st.lists(st.integers(1, 5000), max_size=20),
    limit=st.integers(1, 6000),
    closed=st.sets(st.integers(0, 19)),
)
def test_what_waits_elsewhere_is_never_taken_for_less_nor_for_more_than_twice(
    sizes: list[int], limit: int, closed: set[int]
) -> None:
    mine, theirs = boards(2)
    for size in sizes:
        theirs.waits(size, size)
    left = [size for place, size in enumerate(sizes) if place not in closed]
    for place in closed & set(range(len(sizes))):
        theirs.waits(sizes[place], sizes[place], sign=-1)
    true = sum(min(size, limit) for size in left)
    seqs, tokens = mine.others_waiting(seqs=limit, tokens=limit)
    assert seqs == tokens
    assert true <= seqs <= 2 * true
    if limit & (limit - 1) == 0:
        assert seqs == true
    assert mine.others_num_waiting == sum(left)
    assert theirs.others_num_waiting == 0


@pytest.mark.parametrize(("count", "ranks"), [(2, 2), (3, 2), (4, 8)])
def test_a_burst_into_several_front_ends_is_spread_like_one_into_a_single_one(count: int, ranks: int) -> None:
    front = balancers(count, ranks)
    chosen = []
    for turn in range(2 * ranks * count):
        each = front[turn % count]
        rank = each.choose(10, {})
        each.sent(str(turn), rank, 10)
        chosen.append(rank)
    assert {rank: chosen.count(rank) for rank in range(ranks)} == dict.fromkeys(range(ranks), 2 * count)


def test_front_ends_that_choose_at_the_same_moment_do_not_all_choose_the_same_rank() -> None:
    chosen = [each.choose(10, {}) for each in balancers(4, 4)]
    assert sorted(chosen) == [0, 1, 2, 3]


def test_a_rank_is_as_full_as_all_front_ends_have_made_it_until_their_requests_end() -> None:
    one, other = balancers(2, 2)
    for turn in range(3):
        one.sent(str(turn), 1, 100)
    assert [other.decide(10, {}).rank for _ in range(3)] == [0, 0, 0]
    for turn in range(3):
        one.finished(str(turn))
    assert sorted(other.decide(10, {}).rank for _ in range(2)) == [0, 1]


def test_no_counter_goes_down_from_one_front_end_to_another_that_was_told_earlier() -> None:
    one, other = boards(2)
    early = LoadReport(step=5, steps=4, num_running=1, vote_seconds=0.5, num_blocks=9, free_blocks=3)
    late = LoadReport(step=8, steps=7, num_running=0, vote_seconds=0.75, num_blocks=9, free_blocks=9)
    other.reported(1, early)
    one.reported(1, late)
    assert other.newest(1, early) == late
    assert one.newest(1, late) == late
    assert (other.knows(1), other.knows(0)) == (True, False)
    assert other.newest(0, LoadReport()) == LoadReport()


def test_ranks_and_front_ends_have_places_of_their_own() -> None:
    found = boards(3, 4)
    for number, (board, rank) in enumerate(itertools.product(found, range(4)), 1):
        board.sent(rank, (number, 10 * number, 100 * number))
        board.reported(rank, LoadReport(step=number, num_running=number, steps=number))
    assert found[0].others_sent()[2] == [7 + 11, 70 + 110, 700 + 1100]
    assert found[0].newest(3, LoadReport(num_blocks=5)) == LoadReport(step=12, num_running=12, steps=12, num_blocks=5)
    assert found[1].others_num_waiting == 0
