"""Sums through shared memory: one order whatever their size, and a rank that dies or stops in one is named."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest
import torch

from moe_serve.base.errors import EngineError, RankTimeout
from moe_serve.base.topology import Topology
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.groups import build_groups
from moe_serve.parallel.memory_group import PLACE_BYTES
from tests.support.ranks import RankFailed, Ranks, Seat

pytestmark = pytest.mark.ranks
PATIENCE_SECONDS = 1.5
SHAPES = ((1, 1), (7, 333), (1, PLACE_BYTES // 2), (1, PLACE_BYTES // 2 + 1), (37, 9001))


def brought(rank: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)


def sums_in_order(seat: Seat, size: int) -> None:
    """In bfloat16, where another order would be seen in almost every sum of three."""
    group = seat.groups(Topology(tp=size)).tp
    for shape in SHAPES:
        total = torch.zeros(shape)
        for rank in range(size):
            total += brought(rank, shape).float()
        mine = brought(seat.rank, shape)
        given = mine.clone()
        assert torch.equal(group.all_reduce(mine), total.to(torch.bfloat16))
        assert torch.equal(group.all_reduce(mine.t()), total.to(torch.bfloat16).t()), "as it lies in memory or not"
        assert torch.equal(mine, given)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_of_any_size_are_added_in_order_of_rank_and_rounded_once(ranks: Ranks, size: int) -> None:
    ranks.run(sums_in_order, size, only=size)


def many_by_turns(seat: Seat, size: int) -> None:
    """No barrier between; ranks fall behind each other by turns."""
    group = seat.groups(Topology(tp=size)).tp
    for number in range(300):
        if number % (20 * size) == 20 * seat.rank:
            time.sleep(0.005)
        counts = [(number + rank) % 3 for rank in range(size)]
        rows = group.all_gather_ragged(torch.full((counts[seat.rank], 2), float(number + seat.rank)), counts)
        assert rows[:, 1].tolist() == [float(number + rank) for rank in range(size) for _ in range(counts[rank])]
        total = group.all_reduce(torch.tensor([number, seat.rank]))
        assert total.tolist() == [size * number, size * (size - 1) // 2]


@pytest.mark.parametrize("size", [2, 4])
def test_many_one_after_the_other_do_not_run_into_each_other(ranks: Ranks, size: int) -> None:
    ranks.run(many_by_turns, size, only=size)


def has_none(seat: Seat) -> str:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        group = tp_group(seat, 2, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert group.all_reduce(torch.tensor([seat.rank + 1.0])).tolist() == [3.0]
    return group.transport


def tp_group(seat: Seat, size: int, timeout_seconds: float) -> Group:
    groups = build_groups(
        Topology(tp=size),
        seat.rank,
        store_host=seat.host,
        store_port=seat.port,
        token=seat.token,
        device=torch.device("cpu"),
        timeout_seconds=timeout_seconds,
    )
    return groups.tp


def test_without_memory_sums_go_over_the_network() -> None:
    with Ranks(2) as pair:
        assert pair.run(has_none) == ["gloo"] * 2


def in_both_modes(seat: Seat) -> None:
    """Made, and each type first used, in inference mode or outside of it."""
    for made_within in (True, False):
        with torch.inference_mode(made_within):
            group = tp_group(seat, 2, 20)
        for used_within, dtype in (
            (True, torch.float32),
            (False, torch.float32),
            (False, torch.int64),
            (True, torch.int64),
        ):
            with torch.inference_mode(used_within):
                one = torch.ones(3, dtype=dtype)
                assert group.all_reduce(one).tolist() == [2, 2, 2]
                assert group.all_gather(one).tolist() == [1] * 6
        group.close()


def test_inference_mode_may_begin_and_end_between_two_sums() -> None:
    with Ranks(2) as pair:
        pair.run(in_both_modes)


def stops_and_dies(seat: Seat) -> None:
    """Rank 2 stops before a sum of several pieces, and is then killed."""
    group = tp_group(seat, 3, 30)
    pids = group.all_gather(torch.tensor([os.getpid()])).tolist()
    group.timeout_seconds = PATIENCE_SECONDS
    x = torch.zeros(PLACE_BYTES)
    if seat.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    hears(group, x, RankTimeout, "timed out waiting for rank 2", PATIENCE_SECONDS + 1)
    if seat.rank == 0:
        os.kill(pids[2], signal.SIGKILL)
    time.sleep(0.3)
    hears(group, x, EngineError, "the process of rank 2 has left", 0.5)


def hears(group: Group, x: torch.Tensor, kind: type[EngineError], words: str, within: float) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError) as caught:
        group.all_reduce(x)
    assert type(caught.value) is kind, caught.value
    assert words in str(caught.value)
    assert f"all_reduce in group 'world' failed on rank {group.rank}" in str(caught.value)
    assert time.monotonic() - started < within


@pytest.mark.long
def test_a_stopped_rank_and_a_killed_one_are_named() -> None:
    with Ranks(3) as three, pytest.raises(RankFailed) as caught:
        three.run(stops_and_dies)
    assert str(caught.value) == "rank 2:\nthe process is gone"
