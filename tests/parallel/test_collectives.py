"""Every collective against its definition, on 1 to 4 gloo ranks, ragged and empty, in all types we compute in."""

from __future__ import annotations

import time

import pytest
import torch

from moe_serve.base.errors import EngineError, RankTimeout
from moe_serve.base.topology import Topology
from moe_serve.parallel.collectives import Group, alone
from moe_serve.parallel.groups import ControlGroup, build_groups, control_group
from tests.support.ranks import RankFailed, Ranks, Seat

SIZES = ([3, 0, 5, 2], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 7])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
pytestmark = pytest.mark.ranks


def rows_of(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that tell who made them; small whole numbers, exact in every type."""
    return (torch.arange(count * 3).view(count, 3) % 7 + 10 * rank).to(dtype)


def group_of(seat: Seat, size: int, way: str) -> Group:
    groups = seat.groups(Topology(tp=size) if way == "shm" else Topology(dp=size))
    assert groups.world.transport == ("none" if size == 1 else way)
    return groups.world


def ragged_cases(seat: Seat, size: int, way: str) -> None:
    group = group_of(seat, size, way)
    for dtype in DTYPES:
        for sizes in (case[:size] for case in SIZES):
            mine = rows_of(seat.rank, sizes[seat.rank], dtype)
            everything = torch.cat([rows_of(rank, sizes[rank], dtype) for rank in range(size)])
            assert torch.equal(group.all_gather_ragged(mine, sizes), everything)

            whole = [rows_of(rank, sum(sizes), dtype) for rank in range(size)]
            part = group.reduce_scatter_ragged(whole[seat.rank], sizes)
            total = torch.stack([rows.double() for rows in whole]).sum(0).to(dtype)
            assert torch.equal(part, total.split(sizes)[seat.rank])
            assert part.dtype == dtype

            sends = [sizes[(seat.rank + other) % size] for other in range(size)]
            receives = [sizes[(seat.rank + other) % size] for other in range(size)]  # symmetric on purpose
            out = group.all_to_all_ragged(rows_of(seat.rank, sum(sends), dtype), sends, receives)
            expected = []
            for other in range(size):
                theirs = [sizes[(other + peer) % size] for peer in range(size)]
                expected.append(rows_of(other, sum(theirs), dtype).split(theirs)[seat.rank])
            assert torch.equal(out, torch.cat(expected))


WAYS = pytest.mark.parametrize(
    ("size", "way"), [(1, "gloo"), *((n, way) for n in (2, 3, 4) for way in ("gloo", "shm"))]
)


@WAYS
def test_ragged_exchanges_equal_their_definition(ranks: Ranks, size: int, way: str) -> None:
    ranks.run(ragged_cases, size, way, only=size)


def equal_cases(seat: Seat, size: int, way: str) -> None:
    group = group_of(seat, size, way)
    for dtype in DTYPES:
        mine = rows_of(seat.rank, 4, dtype)
        everybody = [rows_of(rank, 4, dtype) for rank in range(size)]
        assert torch.equal(group.all_gather(mine), torch.cat(everybody))
        total = torch.stack([rows.double() for rows in everybody]).sum(0).to(dtype)
        assert torch.equal(group.all_reduce(mine.clone()), total)
        for source in range(size):
            assert torch.equal(group.broadcast(mine.clone(), source), everybody[source])
    low = group.all_reduce_min(torch.tensor([seat.rank + 5, 9 - seat.rank]))
    assert low.tolist() == [5, 9 - (size - 1)]


@WAYS
def test_equal_exchanges_equal_their_definition(ranks: Ranks, size: int, way: str) -> None:
    ranks.run(equal_cases, size, way, only=size)


def started_together(seat: Seat) -> None:
    group = seat.group()
    with torch.inference_mode():
        first = group.start_all_gather_ragged(torch.full((2, 3), float(seat.rank)), [2] * seat.size)
        second = group.start_all_to_all_ragged(
            torch.full((seat.size, 3), float(seat.rank)), [1] * seat.size, [1] * seat.size
        )
        order = torch.arange(seat.size).float()
        assert torch.equal(second.wait()[:, 0], order)
        assert torch.equal(first.wait()[:, 0], order.repeat_interleave(2))


def test_two_exchanges_may_be_under_way_at_once(ranks: Ranks) -> None:
    ranks.run(started_together)


def bits_of_sums(seat: Seat) -> list[int]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seat.rank))
    return [int(v) for v in seat.group().all_reduce(x).view(torch.int32).flatten()]


def test_an_all_reduce_leaves_the_same_bits_on_every_rank(ranks: Ranks) -> None:
    first, *others = ranks.run(bits_of_sums)
    assert all(other == first for other in others)


def axes(seat: Seat, topology: Topology) -> dict[str, tuple[tuple[int, ...], int, list[int]]]:
    groups = seat.groups(topology)
    named = {"world": groups.world, "dp": groups.dp, "tp": groups.tp, "ep": groups.ep}
    met = {name: group.all_gather(torch.tensor([seat.rank])).tolist() for name, group in named.items()}
    return {name: (group.ranks, group.rank, met[name]) for name, group in named.items()}


def test_groups_join_the_ranks_of_their_axis(ranks: Ranks) -> None:
    for rank, seen in enumerate(ranks.run(axes, Topology(dp=2, tp=2))):
        dp, tp = divmod(rank, 2)
        assert seen["world"] == ((0, 1, 2, 3), rank, [0, 1, 2, 3])
        assert seen["ep"] == ((0, 1, 2, 3), rank, [0, 1, 2, 3])
        assert seen["dp"] == ((tp, 2 + tp), dp, [tp, 2 + tp])
        assert seen["tp"] == ((2 * dp, 2 * dp + 1), tp, [2 * dp, 2 * dp + 1])


def engines_agree(seat: Seat, opinions: list[int], shares_memory: bool) -> tuple[list[list[int]], int, float]:
    ranks, where = range(seat.size), {"store_host": seat.host, "store_port": seat.port, "token": seat.token}
    group = control_group("engines", seat.rank, ranks, timeout_seconds=20, shares_memory=shares_memory, **where)
    votes = [group.all_gather_ints([step, seat.rank, 7]) for step in range(3)][-1]
    assert group.all_gather_ints([seat.rank] * 99) == [[rank] * 99 for rank in ranks]  # more than there is room for
    blocks = group.sync_kv_cache_blocks(opinions[seat.rank])
    started = time.perf_counter()
    for _ in range(100):
        group.all_gather_ints([1, 2, 3])
    seconds = (time.perf_counter() - started) / 100
    group.close()
    return votes, blocks, seconds


@pytest.mark.parametrize(
    ("opinions", "agreed"),
    [([7, 5, -1, 9], 5), ([-1, -1, -1, -1], -1), ([-1, -1, 3, -1], 3), ([0, 4, 4, 4], 0)],
)
@pytest.mark.parametrize("shares_memory", [False, True], ids=["network", "memory"])
def test_engines_agree_on_the_least_cache_somebody_named(
    ranks: Ranks, opinions: list[int], agreed: int, shares_memory: bool
) -> None:
    for votes, blocks, _ in ranks.run(engines_agree, opinions, shares_memory):
        assert votes == [[2, 0, 7], [2, 1, 7], [2, 2, 7], [2, 3, 7]]
        assert blocks == agreed


def test_a_group_of_one_gives_its_input_back() -> None:
    group = alone("tp", 3, torch.device("cpu"))
    x = torch.randn(4, 2)
    for result in (
        group.all_gather(x),
        group.all_gather_ragged(x, [4]),
        group.all_reduce(x),
        group.all_reduce_min(x),
        group.reduce_scatter_ragged(x, [4]),
        group.all_to_all_ragged(x, [4], [4]),
        group.broadcast(x, 0),
    ):
        assert result is x
    assert ControlGroup(group).all_gather_ints([4, 5]) == [[4, 5]]
    assert ControlGroup(group).sync_kv_cache_blocks(12) == 12


def waits_for_an_absent_rank(seat: Seat) -> str:
    groups = build_groups(
        Topology(dp=2),
        seat.rank,
        store_host=seat.host,
        store_port=seat.port,
        token=seat.token,
        device=torch.device("cpu"),
        timeout_seconds=2,
    )
    if seat.rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(RankTimeout) as caught:
        groups.ep.all_reduce(torch.zeros(2))
    return str(caught.value)


def test_a_collective_somebody_misses_times_out_and_says_what_was_done() -> None:
    with Ranks(2) as pair:
        message = pair.run(waits_for_an_absent_rank)[0]
    assert "all_reduce in group 'world' failed on rank 0" in message
    assert "one of ranks 1 is gone or did not come within 2 s" in message


def hears_late(seat: Seat) -> tuple[list[int], str]:
    """Rank 1 sends once, later than its group has patience for, and then no more."""
    groups = build_groups(
        Topology(dp=2),
        seat.rank,
        store_host=seat.host,
        store_port=seat.port,
        token=seat.token,
        device=torch.device("cpu"),
        timeout_seconds=1,
    )
    group = groups.control
    if seat.rank == 1:
        time.sleep(1.5)
        group.start_send(torch.tensor([7]), 0).wait()
        time.sleep(0.5)
        return [], ""
    heard = group.receive(torch.tensor([0]), 1, timeout_seconds=15).tolist()
    with pytest.raises(RankTimeout) as caught:
        group.receive(torch.tensor([0]), 1, timeout_seconds=0.2)
    return heard, str(caught.value)


def test_one_that_waits_for_another_may_have_more_or_less_patience_than_its_group(ranks: Ranks) -> None:
    heard, message = ranks.run(hears_late, only=2)[0]
    assert heard == [7]
    assert "receive in group 'world' failed on rank 0: one of ranks 1 " in message
    assert "did not come within 0.2 s" in message


def joins_as_a_generation_of_its_own(seat: Seat) -> str:
    with pytest.raises(RankTimeout) as caught:
        control_group(
            "engines",
            seat.rank,
            range(seat.size),
            store_host=seat.host,
            store_port=seat.port,
            token=seat.token,
            timeout_seconds=2,
            generation=1 + seat.rank,
        )
    return str(caught.value)


@pytest.mark.long
def test_ranks_of_different_generations_of_a_world_do_not_meet() -> None:
    with Ranks(2) as pair:
        for generation, message in enumerate(pair.run(joins_as_a_generation_of_its_own), start=1):
            assert f"g{generation} engines gloo of ranks 0 1" in message


def leave_and_watch(seat: Seat) -> str:
    group = seat.group()
    group.all_reduce(torch.zeros(2))
    if seat.rank == 1:
        seat.groups(Topology(dp=2)).close()
        seat._groups.clear()
        return ""
    time.sleep(0.5)
    with pytest.raises(EngineError) as caught:
        group.all_gather(torch.zeros(2))
    return str(caught.value)


def test_a_peer_that_left_is_an_error_at_once() -> None:
    with Ranks(2) as pair:
        started = time.monotonic()
        message = pair.run(leave_and_watch)[0]
    assert "all_gather in group 'world' failed on rank 0" in message
    assert time.monotonic() - started < 15


def disagree(seat: Seat) -> None:
    got = seat.group(2).all_gather(torch.tensor([seat.rank]))
    assert got.tolist() == [1, 0]


@pytest.mark.long
def test_a_wrong_expectation_on_a_rank_fails_the_test() -> None:
    with Ranks(2) as pair, pytest.raises(RankFailed, match=r"rank 0:(.|\n)*got.tolist\(\) == \[1, 0\]"):
        pair.run(disagree)
