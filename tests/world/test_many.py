"""A world of thousands: nobody is told twice, and no word of one member takes the coordinator long."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator

from moe_serve.base.config import Config
from moe_serve.base.messages import Failure, FromMember, Hello, Ready, Stop, Wake, WorldReady
from moe_serve.base.topology import Topology
from moe_serve.world.fleet import Fleet
from moe_serve.world.members import Member
from moe_serve.world.orders import to_engines
from moe_serve.world.parcels import Send

AGREEMENT = Config().agreement()
NODE_SIZE = 8
BLOCKED_SECONDS = 0.02


class Many:
    """`ranks` engines on nodes of eight, members 0 and up, and the API server of the first node, the last member."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.longest = 0.0
        self.fleet = Fleet(
            topology=Topology(dp=ranks), agreement=AGREEMENT, has_workers=False, step_timeout_seconds=60, node="node-0"
        )

    def hear(self, member: int, message: FromMember) -> list[Send]:
        before = time.thread_time()
        sends = self.fleet.hear(member, message, 0.0)
        self.longest = max(self.longest, time.thread_time() - before)
        return sends

    def join(self) -> None:
        for dp in range(self.ranks):
            node = f"node-{dp // NODE_SIZE}"
            self.hear(dp, Hello(role="engine", dp=dp, pid=dp, host=node, node=node, agreement=AGREEMENT))
        self.hear(self.ranks, Hello(role="api", pid=1, host="node-0", node="node-0", agreement=AGREEMENT))

    def be_ready(self) -> list[Send]:
        self.hear(self.ranks, Ready(note="here:80"))
        return [send for dp in range(self.ranks) for send in self.hear(dp, Ready())]


def test_a_world_that_all_ranks_wake_at_once_is_woken_once_in_each_nap() -> None:
    many = Many(64)
    many.join()
    many.be_ready()
    for nap in (1, 2):
        sends = [send for dp in range(64) for send in many.hear(dp, Wake(nap))]
        assert Counter(send.member for send in sends) == Counter(range(1, 64)), "rank 0 was the first"
        assert {send.message for send in sends} == {Wake(nap)}
    assert many.hear(5, Wake(1)) == [], "everybody has heard of a later nap"


def test_ranks_that_all_fail_alike_end_the_world_once() -> None:
    many = Many(64)
    many.join()
    sends = [send for dp in range(64) for send in many.hear(dp, Failure("no room for the KV cache", config=True))]
    assert Counter(send.member for send in sends) == Counter(range(65))
    assert {send.message for send in sends} == {Stop("no room for the KV cache", 2, "node-0")}


def test_no_word_of_one_of_two_thousand_members_takes_long_until_the_world_is_ready() -> None:
    many = Many(2048)
    gc.collect()
    gc.disable()  # what it takes follows from all that the tests have made, too
    try:
        many.join()
        sends = many.be_ready()
    finally:
        gc.enable()
    assert Counter(send.message for send in sends) == {WorldReady("here:80"): 9, WorldReady(): 2040}
    assert len({id(send.message) for send in sends}) == 2, "encoded once for each node with an API server"
    assert many.longest < BLOCKED_SECONDS


def test_news_of_which_no_order_follows_are_heard_without_a_look_at_the_members() -> None:
    class Unread(dict[int, Member]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("nobody needs to be looked for")

        items = __iter__  # type: ignore[assignment]

    assert to_engines(Unread(), []) == []
