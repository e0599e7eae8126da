"""Which worker goes into which bundle, and what is refused before an actor exists. No Ray."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.errors import ConfigError
from moe_serve.executor.ray_placement import (
    CPU_SHARE,
    Bundle,
    WorkerPlace,
    check_addresses,
    check_reach,
    check_room,
    choose_bundles,
    new_bundles,
    no_room,
    parse_indices,
    place_workers,
)

GPU, CPU = {"GPU": 1.0, "CPU": 1.0}, {"CPU": 1.0}
MIXED = [
    Bundle(0, "a", CPU),
    Bundle(1, "a", GPU),
    Bundle(2, "b", GPU),
    Bundle(3, "b", {"GPU": 0.5}),
    Bundle(4, "c", GPU),
]


def numbers(bundles: list[Bundle]) -> list[int]:
    return [bundle.index for bundle in bundles]


def place(address: str, node: str = "") -> WorkerPlace:
    return WorkerPlace(bundle=0, node=node or address, address=address, neighbours=1)


def test_the_first_bundles_that_hold_the_device_are_taken() -> None:
    assert numbers(choose_bundles(MIXED, "GPU", 2)) == [1, 2]
    assert numbers(choose_bundles(MIXED, "GPU", 3)) == [1, 2, 4]
    assert numbers(choose_bundles(MIXED, "CPU", 2)) == [0, 1]
    assert numbers(choose_bundles([Bundle(0, "a", {"CPU": CPU_SHARE}), Bundle(1, "a", {})], "CPU", 1)) == [0]


def test_named_bundles_are_taken_in_their_order() -> None:
    assert numbers(choose_bundles(MIXED, "GPU", 3, indices="4, 1,2")) == [4, 1, 2]


@pytest.mark.parametrize(
    ("count", "indices", "message"),
    [
        (4, "", r"the Ray placement group has 5 bundles, 3 of them with a GPU, but 4 ranks need one each"),
        (2, "1", r"names 1 bundles for 2 ranks .*--ray-bundle-indices"),
        (2, "1,2,4", r"names 3 bundles for 2 ranks"),
        (2, "1,1", r"'1,1' names 1 more than once; give each rank a bundle of its own \(option --ray-bundle-indices\)"),
        (2, "1,5", r"names bundle 5, but the Ray placement group has bundles 0 to 4"),
        (2, "1,3", r"names bundle 3, which holds GPU 0.5 and not a GPU"),
        (2, "1,-2", r"'1,-2' must be numbers of bundles with commas between, such as 0,1"),
        (2, "1;2", r"must be numbers of bundles"),
    ],
)
def test_too_few_bundles_and_doubled_wrong_or_unknown_ones_are_refused(count: int, indices: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_bundles(MIXED, "GPU", count, indices=indices)


@given(st.lists(st.integers(0, 50), unique=True, min_size=1))
def test_indices_are_read_as_they_are_written(indices: list[int]) -> None:
    assert parse_indices(", ".join(map(str, indices)), count=len(indices)) == indices


def test_the_drivers_node_comes_first_then_smaller_ones_then_lower_addresses() -> None:
    nodes = ["many", "ten", "driver", "two", "many", "driver", "many"]
    addresses = {"driver": "10.0.0.9", "many": "10.0.0.1", "ten": "10.0.0.10", "two": "10.0.0.2"}
    bundles = [Bundle(index, node, GPU) for index, node in enumerate(nodes)]
    places = place_workers(bundles, addresses, driver="driver")
    assert [each.bundle for each in places] == [2, 5, 3, 1, 0, 4, 6]
    assert [each.address for each in places] == [addresses[nodes[each.bundle]] for each in places]
    assert [each.neighbours for each in places] == [2, 2, 1, 1, 3, 3, 3]


@given(
    nodes=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20),
    driver=st.sampled_from("abcdefg"),
    order=st.permutations(range(7)),
)
def test_every_bundle_has_one_worker_and_workers_of_a_node_are_neighbours(
    nodes: list[str], driver: str, order: list[int]
) -> None:
    addresses = {node: f"10.0.0.{number}" for node, number in zip("abcdefg", order, strict=True)}
    bundles = [Bundle(index, node, CPU) for index, node in enumerate(nodes)]
    places = place_workers(bundles, addresses, driver=driver)
    assert sorted(each.bundle for each in places) == list(range(len(nodes)))
    runs = [(node, len(list(run))) for node, run in itertools.groupby(places, key=lambda each: each.node)]
    assert len({node for node, _ in runs}) == len(runs)
    assert driver not in nodes or runs[0][0] == driver
    sizes = [size for node, size in runs if node != driver]
    assert sizes == sorted(sizes)
    assert all(dict(runs)[each.node] == each.neighbours for each in places)


def test_nodes_that_share_an_address_are_refused_with_all_addresses() -> None:
    addresses = {"aaaaaaaaaaaa": "10.0.0.1", "bbbbbbbbbbbb": "10.0.0.2", "cccccccccccc": "10.0.0.1", "d": "10.0.0.1"}
    told = r"share an address \(10.0.0.1: aaaaaaaa, cccccccc; 10.0.0.2: bbbbbbbb\); give each its own"
    with pytest.raises(ConfigError, match=told):
        check_addresses(["cccccccccccc", "aaaaaaaaaaaa", "aaaaaaaaaaaa", "bbbbbbbbbbbb"], addresses)
    check_addresses(["aaaaaaaaaaaa", "aaaaaaaaaaaa", "bbbbbbbbbbbb"], addresses)


def test_an_engine_on_loopback_is_refused_only_where_a_worker_could_not_reach_it() -> None:
    here, there, near = place("10.0.0.1", "driver"), place("10.0.0.2"), place("127.0.0.3")
    check_reach([here, near], at="127.0.0.1", driver="driver", driver_address="10.0.0.1")
    check_reach([here, there], at="10.0.0.1", driver="driver", driver_address="10.0.0.1")
    for engine in ("127.0.0.1", "::1", "localhost"):
        with pytest.raises(
            ConfigError, match=r"workers on 10.0.0.2, from .*--data-parallel-address.*Ray says: 10.0.0.1"
        ):
            check_reach([here, there], at=engine, driver="driver", driver_address="10.0.0.1")


def test_a_worker_asks_for_a_whole_gpu_or_for_a_small_share_of_a_core() -> None:
    assert new_bundles("GPU", 2) == [{"GPU": 1.0}, {"GPU": 1.0}]
    assert new_bundles("CPU", 3, first_on="10.0.0.1") == [
        {"CPU": CPU_SHARE, "node:10.0.0.1": 0.001},
        {"CPU": CPU_SHARE},
        {"CPU": CPU_SHARE},
    ]


def test_a_cluster_that_is_too_small_is_told_with_what_it_has() -> None:
    check_room("GPU", 4, total=4, free=0)
    check_room("CPU", 50, total=1, free=0)
    with pytest.raises(
        ConfigError, match="the Ray cluster has 1 GPU, 1 of them free, but 2 workers need one each; start"
    ):
        check_room("GPU", 2, total=1, free=1)
    late = str(no_room("CPU", 2, total=2, free=0, waited=35))
    assert "has 2 CPUs, 0 of them free, but 2 workers need 0.01 of one each and could not be placed within 35 s" in late
