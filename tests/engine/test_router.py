"""Which DP rank gets the next request: even splits, weight by tokens, free KV, and reports that are late or wrong."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.base.engine_messages import LoadReport
from moe_serve.base.errors import RequestError
from moe_serve.engine.router import FRESH_SECONDS, FRESH_STEPS, Balancer, Capacity, RankLoad, choose_rank

CAPACITY = Capacity(max_num_seqs=128, max_num_batched_tokens=2048, block_size=16, num_blocks=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def send(balancer: Balancer, request_id: str, num_tokens: int, reports: dict[int, LoadReport] | None = None) -> int:
    rank = balancer.choose(num_tokens, reports or {})
    balancer.sent(request_id, rank, num_tokens)
    return rank


def test_an_empty_world_is_filled_in_turn() -> None:
    balancer = Balancer(4, clock=Clock())
    assert [send(balancer, str(i), 10) for i in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_requests_that_end_before_the_next_still_go_round() -> None:
    balancer = Balancer(3, clock=Clock())
    ranks = []
    for number in range(6):
        ranks.append(send(balancer, str(number), 10))
        balancer.finished(str(number))
    assert ranks == [0, 1, 2, 0, 1, 2]


@given(ranks=st.integers(1, 8), count=st.integers(0, 60), num_tokens=st.integers(1, 5000))
def test_a_burst_of_equal_requests_is_split_evenly(ranks: int, count: int, num_tokens: int) -> None:
    balancer = Balancer(ranks, clock=Clock())
    counts = Counter(send(balancer, str(number), num_tokens) for number in range(count))
    per_rank = [counts[rank] for rank in range(ranks)]
    assert max(per_rank) - min(per_rank) <= 1


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=60), st.integers(2, 4))
def test_queued_tokens_differ_by_no_more_than_one_prompt_and_the_slots(lengths: list[int], ranks: int) -> None:
    balancer = Balancer(ranks, clock=Clock())
    queued, seqs = [0] * ranks, [0] * ranks
    for number, length in enumerate(lengths):
        rank = send(balancer, str(number), length)
        queued[rank] += length
        seqs[rank] += 1
    costs = [tokens / 2048 + count / 128 for tokens, count in zip(queued, seqs, strict=True)]
    assert max(costs) - min(costs) <= max(lengths) / 2048 + 1 / 128 + 1e-9


def test_a_long_prompt_counts_by_its_tokens_until_it_is_computed() -> None:
    balancer = Balancer(2, clock=Clock())
    assert send(balancer, "long", 8000) == 0
    assert [send(balancer, str(number), 100) for number in range(10)] == [1] * 10
    balancer.progressed("long", 1)
    assert send(balancer, "next", 100) == 0


def test_finished_and_unknown_requests_leave_nothing_behind() -> None:
    balancer = Balancer(2, clock=Clock())
    for number in range(5):
        send(balancer, str(number), 100)
        balancer.progressed(str(number), number)
    for number in range(5):
        balancer.finished(str(number))
        balancer.finished(str(number))
        balancer.progressed(str(number), 3)
    assert balancer.decide(10, {}).costs == (0.0, 0.0)


def test_a_rank_without_free_kv_is_avoided_while_others_have_room() -> None:
    full, busy = RankLoad(0, 1, 1000), RankLoad(100_000, 500, 900)
    choice = choose_rank([full, busy], 100, CAPACITY)
    assert (choice.rank, choice.short) == (1, (True, False))
    assert "free KV" in choice.reason


def test_when_no_rank_has_free_kv_the_one_with_least_to_do_is_taken() -> None:
    choice = choose_rank([RankLoad(500, 9, 1000), RankLoad(0, 9, 1000)], 100, CAPACITY)
    assert choice.rank == 1
    assert choice.reason.startswith("no rank has free KV")


@given(
    st.lists(
        st.builds(RankLoad, st.integers(0, 9999), st.integers(0, 300), st.integers(0, 1200)), min_size=1, max_size=6
    ),
    st.integers(1, 4000),
    st.integers(0, 5),
)
def test_no_other_rank_is_better_than_the_chosen_one(loads: list[RankLoad], num_tokens: int, start: int) -> None:
    choice = choose_rank(loads, num_tokens, CAPACITY, start)
    marks = list(zip(choice.short, choice.costs, strict=True))
    assert marks[choice.rank] == min(marks)
    assert str(choice.rank) in str(choice)


def test_a_long_talk_holds_kv_and_so_counts_after_its_prompt_is_computed() -> None:
    balancer = Balancer(2, clock=Clock())
    reports = {rank: LoadReport(num_blocks=1000, free_blocks=1000) for rank in range(2)}
    assert send(balancer, "a", 1600, reports) == 0
    assert send(balancer, "b", 16, reports) == 1
    balancer.progressed("a", 1)
    balancer.progressed("b", 1)
    assert balancer.decide(10, reports).rank == 1
    assert balancer.decide(10, reports).reason == "least to do"


def test_requests_that_share_a_prefix_do_not_make_a_rank_look_full() -> None:
    balancer = Balancer(2, clock=Clock())
    reports = {rank: LoadReport(num_blocks=100, free_blocks=100) for rank in range(2)}
    for number in range(4):
        balancer.sent(str(number), 0, 800)  # 50 blocks each, but one prefix
        balancer.progressed(str(number), 1)
    assert balancer.decide(10, reports).short == (False, False)
    assert balancer.decide(1590, {0: LoadReport(num_blocks=100, free_blocks=45)}).short == (True, False)


def test_what_other_front_ends_sent_counts_while_the_report_is_fresh() -> None:
    clock = Clock()
    balancer = Balancer(2, shared=True, clock=clock)
    reports = {0: LoadReport(num_running=50, waiting_tokens=9000, num_blocks=1000, free_blocks=100)}
    assert [send(balancer, str(number), 10, reports) for number in range(6)] == [1] * 6
    clock.now = FRESH_SECONDS + 1
    assert [send(balancer, str(10 + number), 10, reports) for number in range(6)] == [0] * 6


def test_a_report_that_lags_many_steps_behind_the_others_counts_for_nothing() -> None:
    balancer = Balancer(2, shared=True, clock=Clock())
    old = LoadReport(step=1, num_running=50)
    assert send(balancer, "a", 10, {0: old, 1: LoadReport(step=FRESH_STEPS)}) == 1
    assert send(balancer, "b", 10, {0: old, 1: LoadReport(step=FRESH_STEPS + 2)}) == 0


def test_own_requests_that_a_report_knows_are_not_counted_twice() -> None:
    balancer = Balancer(2, shared=True, clock=Clock())
    for number in range(4):
        balancer.sent(f"a{number}", 0, 96)
        balancer.sent(f"b{number}", 1, 96)
    # Rank 0 reports what we sent; rank 1 has not reported at all. Both have the same to do.
    report = LoadReport(num_running=1, num_waiting=3, waiting_tokens=384, num_blocks=1000, free_blocks=1000)
    choice = balancer.decide(10, {0: report})
    assert choice.costs[0] == choice.costs[1]


any_report = st.builds(
    LoadReport,
    step=st.integers(0, 500),
    num_running=st.integers(0, 1000),
    num_waiting=st.integers(0, 1000),
    waiting_tokens=st.integers(0, 10**6),
    free_blocks=st.integers(0, 1000),
    num_blocks=st.just(1000),
)


@given(st.lists(any_report, min_size=3, max_size=3), st.integers(1, 60), st.integers(1, 300))
def test_no_report_can_bend_the_split_of_a_burst(reports: list[LoadReport], count: int, num_tokens: int) -> None:
    balancer = Balancer(3, clock=Clock())
    told = dict(enumerate(reports))
    counts = Counter(send(balancer, str(number), num_tokens, told) for number in range(count))
    per_rank = [counts[rank] for rank in range(3)]
    assert max(per_rank) - min(per_rank) <= 1


actions = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 600)),
        st.tuples(st.just("progress"), st.integers(0, 99)),
        st.tuples(st.just("finish"), st.integers(0, 99)),
        st.tuples(st.just("report"), st.tuples(st.integers(0, 2), any_report)),
    ),
    max_size=120,
)


@settings(max_examples=200)
@given(actions)
def test_wrong_reports_never_flood_or_starve_a_rank(script: list[tuple[str, object]]) -> None:
    """Whatever reports say, the chosen rank's tokens and slots never exceed another's whole cost (unless that has no
    KV left); and once the reports are old, the choice is exactly the one made from this front-end's own books."""
    clock = Clock()
    balancer = Balancer(3, clock=clock)
    reports: dict[int, LoadReport] = {0: LoadReport(num_blocks=1000, free_blocks=1000)}
    sent: list[list[int]] = []  # rank, tokens, queued, finished

    def shares(rank: int) -> tuple[float, float, int]:
        alive = [item for item in sent if item[0] == rank and not item[3]]
        work = sum(item[2] for item in alive) / 2048 + len(alive) / 128
        blocks = sum(-(-item[1] // 16) for item in alive)
        return work, work + blocks / 1000, blocks

    def check(rank: int, num_tokens: int, *, exact: bool) -> None:
        for other in range(3):
            if shares(other)[2] + -(-(num_tokens + 1) // 16) <= 1000:
                assert shares(rank)[1 if exact else 0] <= shares(other)[1] + 1e-9

    for action, value in script:
        if action == "send":
            assert isinstance(value, int)
            rank = send(balancer, str(len(sent)), value, reports)
            check(rank, value, exact=False)
            sent.append([rank, value, value, 0])
        elif action == "report":
            assert isinstance(value, tuple)
            reports[value[0]] = value[1]
        elif sent:
            assert isinstance(value, int)
            number = value % len(sent)
            if action == "progress" and not sent[number][3]:
                sent[number][1] += 5
                sent[number][2] = 0
                balancer.progressed(str(number), 5)
            elif action == "finish":
                sent[number][3] = 1
                balancer.finished(str(number))
    balancer.decide(1, reports)
    clock.now += FRESH_SECONDS + 1
    check(balancer.choose(1, reports), 1, exact=True)


def test_a_pinned_rank_is_taken_whatever_its_load() -> None:
    balancer = Balancer(2, clock=Clock())
    balancer.sent("a", 1, 5000)
    choice = balancer.decide(10, {}, pinned=1)
    assert (choice.rank, choice.reason) == (1, "pinned")


@pytest.mark.parametrize("pinned", [-1, 2])
def test_a_pinned_rank_that_does_not_exist_is_a_request_error(pinned: int) -> None:
    with pytest.raises(RequestError, match=rf"\[0, 2\).*not {pinned}"):
        Balancer(2, clock=Clock()).choose(10, {}, pinned=pinned)


def test_the_choice_explains_itself() -> None:
    balancer = Balancer(2, max_num_batched_tokens=1000, max_num_seqs=10, clock=Clock())
    balancer.sent("a", 0, 500)
    assert str(balancer.decide(10, {})) == "DP rank 1 (least to do) of {0: 0.600, 1: 0.000}"


def test_only_ranks_that_are_served_are_chosen_and_others_cannot_be_pinned() -> None:
    balancer = Balancer(4, clock=Clock(), serves=[1, 3])
    assert [send(balancer, str(number), 100) for number in range(6)] == [1, 3, 1, 3, 1, 3]
    assert balancer.decide(10, {}, pinned=3).rank == 3
    with pytest.raises(RequestError, match=r"must be one of 1, 3, the data-parallel ranks .* not 2"):
        balancer.decide(10, {}, pinned=2)


def test_free_kv_of_ranks_that_are_not_served_does_not_count() -> None:
    choice = choose_rank([RankLoad(0, 0, 0), RankLoad(0, 1, 1000)], 100, CAPACITY, among=[1])
    assert choice.rank == 1
    assert choice.reason.startswith("no rank has free KV")


def test_a_request_among_two_thousand_ranks_with_fresh_reports_is_placed_in_twenty_milliseconds() -> None:
    balancer = Balancer(2048, clock=Clock(), shared=True)
    reports = {rank: LoadReport(step=rank % 50, num_running=rank % 7, num_blocks=100) for rank in range(2048)}
    balancer.choose(100, reports)
    before = time.thread_time()
    balancer.choose(100, reports)
    assert time.thread_time() - before < 0.02
