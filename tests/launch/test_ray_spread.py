"""Which engine goes to which nodes of a Ray cluster. No Ray."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.errors import ConfigError
from moe_serve.launch.ray_spread import NodeRoom, spread_engines

Rooms = dict[str, int]
ADDRESSES = {"d": "10.0.0.9", "a": "10.0.0.2", "b": "10.0.0.10", "c": "10.0.0.11"}
"""By node; d is the driver's."""


def spread(rooms: Rooms, *, engines: int, size: int = 1, local: int | None = None) -> str:
    told = [NodeRoom(node, ADDRESSES[node], workers) for node, workers in rooms.items()]
    return "".join(spread_engines(told, engines=engines, size=size, driver="d", local=local))


@pytest.mark.parametrize(
    ("rooms", "options", "nodes"),
    [
        ({"b": 2, "a": 2, "d": 2}, {"engines": 5}, "ddaab"),
        ({"b": 100, "d": 100}, {"engines": 3}, "ddd"),
        ({"b": 100, "a": 100, "d": 100}, {"engines": 3, "local": 1}, "dab"),
        ({"b": 1, "a": 9, "d": 9}, {"engines": 5, "local": 2}, "ddaab"),
        ({"a": 4, "d": 0}, {"engines": 2, "size": 2}, "aaaa"),
        ({"a": 3, "d": 3}, {"engines": 2, "size": 2}, "ddaa"),
        ({"a": 3, "d": 3}, {"engines": 3, "size": 2}, "ddaada"),
        ({"a": 2, "b": 2, "d": 2}, {"engines": 1, "size": 5}, "ddaab"),
        ({"a": 1, "d": 3}, {"engines": 1, "size": 4}, "ddda"),
    ],
    ids=str,
)
def test_nodes_are_filled_with_whole_engines_the_drivers_first_then_lower_addresses(
    rooms: Rooms, options: dict[str, int], nodes: str
) -> None:
    assert spread(rooms, **options) == nodes


@pytest.mark.parametrize(
    ("rooms", "options", "message"),
    [
        (
            {"a": 1, "d": 2},
            {"engines": 4},
            r"has room for 3 of 4 engines of 1 worker \(nodes: 10.0.0.9 for 2, 10.0.0.2 for 1\); add nodes, or start",
        ),
        ({"a": 1, "d": 2}, {"engines": 2, "size": 2}, r"has room for 1 of 2 engines of 2 workers \(nodes: "),
        ({}, {"engines": 1}, r"has room for 0 of 1 engines of 1 worker \(nodes: none\)"),
        (
            {"a": 9, "d": 9},
            {"engines": 3, "local": 1},
            r"has room for 2 of 3 engines of 1 worker, at most 1 on a node \(--data-parallel-size-local\)",
        ),
        ({"a": 3, "d": 3}, {"engines": 3, "size": 2, "local": 1}, "has room for 2 of 3 engines"),
        (
            {"a": 9, "d": 3},
            {"engines": 2, "size": 2, "local": 2},
            r"data_parallel_size_local is 2, but this node has room .* for 1 engines of 2 workers \(it can hold 3\)",
        ),
    ],
    ids=str,
)
def test_what_has_no_room_is_told_with_the_room_that_there_is(
    rooms: Rooms, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        spread(rooms, **options)


@given(
    rooms=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9), min_size=1),
    engines=st.integers(1, 6),
    size=st.integers(1, 4),
)
def test_every_worker_has_a_place_where_there_is_room_and_engines_are_whole_where_they_can_be(
    rooms: Rooms, engines: int, size: int
) -> None:
    if sum(rooms.values()) < engines * size:
        with pytest.raises(ConfigError, match="add nodes"):
            spread(rooms, engines=engines, size=size)
        return
    nodes = spread(rooms, engines=engines, size=size)
    assert len(nodes) == engines * size
    assert all(count <= rooms[node] for node, count in Counter(nodes).items())
    own = [nodes[first : first + size] for first in range(0, len(nodes), size)]
    whole = sum(len(set(each)) == 1 for each in own)
    assert whole >= min(engines, sum(workers // size for workers in rooms.values()))
    if rooms.get("d", 0) >= size:
        assert own[0] == "d" * size
