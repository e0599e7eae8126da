"""The launchers of an engine's other nodes: told where the engine listens, missed by name, refused by name."""

from __future__ import annotations

import pytest

from moe_serve.base.config import Config
from moe_serve.base.messages import EngineAt, Hello, Leaving, Refused, Retire, Stop, StoreAt
from moe_serve.base.topology import Topology
from moe_serve.world.fleet import Fleet
from moe_serve.world.parcels import Send
from moe_serve.world.places import absent_nodes

AGREEMENT = Config().agreement()
AT = EngineAt("tcp://host0:5")


def make_fleet(nodes: int = 3) -> Fleet:
    topology = Topology(pp=nodes, tp=2, nodes=nodes)
    return Fleet(topology=topology, agreement=AGREEMENT, has_workers=True, step_timeout_seconds=60, node="first")


def node(number: int, **changes: object) -> Hello:
    values: dict[str, object] = {"role": "launcher", "pid": 300, "host": "there", "node": f"there-{number}"}
    return Hello(**(values | {"node_rank": number, "agreement": AGREEMENT} | changes))  # type: ignore[arg-type]


ENGINE = Hello(role="engine", dp=0, pid=100, host="here", node="first", agreement=AGREEMENT)


def places(sends: list[Send], member: int) -> list[object]:
    told = [send.message for send in sends if send.member == member]
    return [message for message in told if isinstance(message, StoreAt | EngineAt)]


def test_nodes_are_told_where_the_engine_listens_whether_they_come_before_it_or_after() -> None:
    fleet = make_fleet()
    assert places(fleet.hear(1, node(1), 0), 1) == []
    fleet.hear(0, ENGINE, 0)
    assert places(fleet.hear(0, StoreAt("host0", 4), 0), 1) == [], "the store is for engines and workers"
    assert places(fleet.hear(0, AT, 0), 1) == [AT]
    assert places(fleet.hear(2, node(2), 0), 2) == [AT]


def test_nodes_that_have_not_come_are_named_with_their_workers() -> None:
    fleet = make_fleet()
    assert absent_nodes(fleet.members.values(), fleet.topology) == "node 1 (workers 2, 3), node 2 (workers 4, 5)"
    fleet.hear(1, node(1), 0)
    assert absent_nodes(fleet.members.values(), fleet.topology) == "node 2 (workers 4, 5)"
    fleet.hear(2, node(2), 0)
    assert absent_nodes(fleet.members.values(), fleet.topology) == ""
    assert absent_nodes([], Topology(tp=2, nodes=2)) == "node 1 (worker 1)"


@pytest.mark.parametrize(
    ("hello", "sentence", "patience"),
    [
        (node(1, pid=301), "launcher of node 1 (pid 300 on there) is here already", 14),
        (node(3), "must be one in [1, 3); node 0 was started with --nnodes 3", 0),
        (node(0), "must be one in [1, 3)", 0),
        (node(-1, ranks=[0]), "must be one of 3 nodes: rank 0 was started with --nnodes 3", 0),
        (node(2, agreement=AGREEMENT | {"nnodes": "4"}), "other options than node 0: nnodes: 4, not 1", 0),
    ],
    ids=str,
)
def test_who_is_none_of_them_is_refused_by_name_here_and_there(hello: Hello, sentence: str, patience: float) -> None:
    fleet = make_fleet()
    fleet.hear(1, node(1), 0)
    (send,) = fleet.hear(50, hello, 1)
    assert isinstance(send.message, Refused)
    assert sentence in send.message.reason
    assert send.message.patience_seconds == patience
    assert fleet.ended is None
    assert [sentence in line for line in fleet.take_log()] == ([] if patience else [True])


def test_a_node_of_an_engine_has_no_place_where_engines_are_not_spread() -> None:
    fleet = make_fleet(nodes=1)
    (send,) = fleet.hear(50, node(1), 1)
    assert isinstance(send.message, Refused)
    assert "rank 0 was started without --nnodes" in send.message.reason


def test_a_node_that_leaves_may_be_replaced_until_the_engine_was_told_and_then_ends_the_world_by_name() -> None:
    fleet = make_fleet()
    fleet.hear(1, node(1), 0)
    fleet.hear(1, Leaving("mistyped"), 0)
    fleet.lost(1, 0)
    assert fleet.ended is None
    fleet.hear(2, node(1, pid=301), 0)
    fleet.hear(0, ENGINE, 0)
    fleet.hear(0, AT, 0)
    fleet.hear(2, Leaving("worker dp 0 tp 1 (pid 7) exited with code 1"), 1)
    left = "launcher of node 1 (pid 301 on there) left: worker dp 0 tp 1 (pid 7) exited with code 1"
    assert fleet.ended == Stop(left, 1, "there-1")


def test_a_node_that_is_asked_to_stop_ends_the_world_in_its_own_name_whoever_drains() -> None:
    fleet = make_fleet(nodes=2)
    fleet.hear(1, node(1), 0)
    fleet.hear(9, Hello(role="api", pid=99, host="here", node="first", agreement=AGREEMENT), 0)
    fleet.ready = True
    fleet.hear(1, Retire(5), 1)
    fleet.hear(9, Leaving("drained"), 2)
    assert fleet.ended == Stop("drained", 0, "there-1")


def test_a_node_that_dies_is_named_as_its_workers_are_with_their_node() -> None:
    fleet = make_fleet()
    fleet.hear(1, node(1), 0)
    fleet.hear(5, Hello(role="worker", dp=0, worker=3, pid=7, host="there", node="there-1"), 0)
    assert fleet.members[5].name == "worker dp 0 pp 1 tp 1 of node 1 (pid 7 on there)"
    fleet.lost(1, 0)
    assert fleet.ended == Stop("launcher of node 1 (pid 300 on there) died", 1, "there-1")
