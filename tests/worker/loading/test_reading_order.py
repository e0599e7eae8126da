"""At most so many ranks of an engine read at a time, all of them do, and none goes on before all have."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import defaultdict
from typing import Any

import pytest
from torch import Tensor

from moe_serve.base.errors import RankTimeout
from moe_serve.parallel.pending import Pending
from moe_serve.worker.loading.reading_order import ReadingOrder, reading_place

WAIT = 10.0
FIRST_RANK = 5
"""Of the engine; ranks before it belong to others."""


class FakeGroup:
    """One rank's view of messages between threads; a send is done when it has been received."""

    def __init__(self, rank: int, lines: defaultdict[tuple[int, int], queue.Queue[threading.Event]]) -> None:
        self.rank = rank
        self.ranks = range(64)
        self._lines = lines

    def start_send(self, x: Tensor, to: int) -> Pending[Tensor]:
        received = threading.Event()
        self._lines[self.rank, to].put(received)

        def wait() -> Tensor:
            assert received.wait(WAIT), f"rank {to} never took what rank {self.rank} sent"
            return x

        return Pending(wait)

    def receive(self, out: Tensor, source: int, *, timeout_seconds: float) -> Tensor:
        try:
            self._lines[source, self.rank].get(timeout=timeout_seconds).set()
        except queue.Empty:
            raise RankTimeout("too late") from None
        return out


def order_of(worker: int, num_workers: int, at_once: int, lines: Any, seconds: float = WAIT) -> ReadingOrder:
    place = reading_place(worker, num_workers, at_once)
    assert place is not None
    group: Any = FakeGroup(FIRST_RANK + worker, lines)
    return ReadingOrder(place, group, range(FIRST_RANK, FIRST_RANK + num_workers), timeout_seconds=seconds)


def read_all(num_workers: int, at_once: int) -> list[tuple[float, float, float]]:
    """When each worker began to read, had read, and went on."""
    lines: defaultdict[tuple[int, int], queue.Queue[threading.Event]] = defaultdict(queue.Queue)
    chance = random.Random(num_workers * 100 + at_once)
    naps = [chance.uniform(0.001, 0.02) for _ in range(num_workers)]
    times: dict[int, tuple[float, float, float]] = {}

    def read(worker: int) -> None:
        order = order_of(worker, num_workers, at_once, lines)
        order.await_turn()
        began = time.monotonic()
        time.sleep(naps[worker])
        ended = time.monotonic()
        order.pass_on()
        times[worker] = began, ended, time.monotonic()

    threads = [threading.Thread(target=read, args=(worker,)) for worker in range(num_workers)]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    assert sorted(times) == list(range(num_workers))
    assert all(line.empty() for line in lines.values()), "somebody was told and did not listen"
    return [times[worker] for worker in range(num_workers)]


@pytest.mark.parametrize(("num_workers", "at_once"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (8, 3), (9, 2)])
def test_at_most_so_many_read_at_a_time_and_nobody_goes_on_before_all_have(num_workers: int, at_once: int) -> None:
    times = read_all(num_workers, at_once)
    for began, _, _ in times:
        assert sum(other <= began < ended for other, ended, _ in times) <= at_once
    assert min(gone_on for _, _, gone_on in times) >= max(ended for _, ended, _ in times)


@pytest.mark.parametrize(("num_workers", "at_once"), [(1, None), (4, None), (1, 1), (4, 4), (4, 9)])
def test_without_a_limit_below_their_number_nobody_waits(num_workers: int, at_once: int | None) -> None:
    assert {reading_place(worker, num_workers, at_once) for worker in range(num_workers)} == {None}


def test_who_waits_too_long_names_the_rank_that_reads_and_the_option() -> None:
    with pytest.raises(
        RankTimeout, match=r"^rank 5 has not read its weights within 0.01 s \(--start-timeout-seconds\)"
    ):
        order_of(1, 2, 1, defaultdict(queue.Queue), seconds=0.01).await_turn()
