"""Object groups, barriers and process groups: order, size, expiry, absent ranks, taken ports, who may connect."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from moe_serve.base.errors import ConfigError, EngineError, RankTimeout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.process_groups import init_process_group
from moe_serve.parallel.stateless import ObjectGroup, decode, encode, split_tensor_along_last_dim
from moe_serve.parallel.store import open_store
from tests.support.ranks import Ranks, Seat

HOST = "127.0.0.1"


class Record(msgspec.Struct, frozen=True):
    name: str
    sizes: list[int]


@pytest.fixture
def pair() -> Iterator[tuple[ObjectGroup, ObjectGroup]]:
    """Two members of one object group, each with its own connection, in this process."""
    first, second = members(2)
    yield first, second
    second.close()
    first.close()


def members(size: int, **options: Any) -> list[ObjectGroup]:
    first = ObjectGroup.create(HOST, 0, 0, size, **options)
    rest = [ObjectGroup.create(HOST, first.port, rank, size, **options) for rank in range(1, size)]
    return [first, *rest]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls at once, one thread each; their results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(30) for future in [pool.submit(call) for call in calls]]


def keys_left(group: ObjectGroup) -> list[str]:
    """What lies in the group's part of the store."""
    store = group._store
    assert isinstance(store, PrefixStore)
    tcp = store.underlying_store.underlying_store
    return [key for key in tcp.list_keys() if "objects/" in key]


# -- objects --


def test_objects_arrive_in_the_order_they_were_sent(pair: tuple[ObjectGroup, ObjectGroup]) -> None:
    first, second = pair
    for number in range(20):
        first.send_obj(number, 1)
        second.send_obj(-number, 0)
    assert [second.recv_obj(0) for _ in range(20)] == list(range(20))
    assert [first.recv_obj(1) for _ in range(20)] == [-number for number in range(20)]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 20_000_000])
def test_objects_of_any_size_come_back_whole(pair: tuple[ObjectGroup, ObjectGroup], size: int) -> None:
    first, second = pair
    payload = np.random.default_rng(0).bytes(size)
    first.send_obj({"payload": payload, "after": [1, None, 2.5, "x"]}, 1)
    assert second.recv_obj(0) == {"payload": payload, "after": [1, None, 2.5, "x"]}
    assert keys_left(first) == []


@pytest.mark.parametrize("dtype", ["int64", "float32", "float16", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (4, 5)])
def test_arrays_keep_shape_and_type(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    back = decode(encode({"array": array}))["array"]
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert np.array_equal(back, array)


def test_records_come_back_as_their_type(pair: tuple[ObjectGroup, ObjectGroup]) -> None:
    first, second = pair
    first.send_obj(Record("a", [1, 2]), 1)
    assert second.recv_obj(0, Record) == Record("a", [1, 2])


def test_what_is_not_data_is_refused() -> None:
    with pytest.raises(TypeError, match="only plain data"):
        encode({"call": print})
    with pytest.raises(TypeError, match="only plain data"):
        encode(np.array([object()]))


def test_bytes_that_name_an_object_array_are_not_decoded() -> None:
    inner = msgspec.msgpack.encode(("|O", (1,), b"\0" * 8))
    with pytest.raises((ValueError, msgspec.DecodeError)):
        decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(1, inner)))


def test_every_rank_gets_broadcasts_and_gathers_in_order() -> None:
    group = members(3)

    def script(member: ObjectGroup) -> list[Any]:
        seen = []
        for turn in range(4):
            seen.append(member.broadcast_obj([turn, member.rank], turn % 3))
            seen.append(member.all_gather_obj({"rank": member.rank, "turn": turn}))
        return seen

    expected = [
        entry for turn in range(4) for entry in ([turn, turn % 3], [{"rank": rank, "turn": turn} for rank in range(3)])
    ]
    assert together(*(lambda member=member: script(member) for member in group)) == [expected] * 3
    assert keys_left(group[0]) == []


def test_a_group_of_one_talks_to_itself_without_waiting() -> None:
    (only,) = members(1)
    assert only.all_gather_obj(5) == [5]
    assert only.broadcast_obj("x", 0) == "x"
    only.barrier(1)
    with pytest.raises(ValueError, match="rank 0 of 1 cannot exchange objects with rank 0"):
        only.send_obj(1, 0)


def test_a_missing_object_is_a_timeout_that_names_its_sender() -> None:
    first, second = members(2, store_timeout=1)
    with pytest.raises(RankTimeout, match=r"object 0 for rank 1: waited 1 s for rank 0"):
        second.recv_obj(0)
    first.send_obj("late", 1)
    assert second.recv_obj(0) == "late"


def test_a_gather_names_only_the_ranks_that_are_missing() -> None:
    group = members(4, store_timeout=1)

    def fails(member: ObjectGroup) -> str:
        with pytest.raises(RankTimeout) as caught:
            member.all_gather_obj(member.rank)
        return str(caught.value)

    for message in together(lambda: fails(group[0]), lambda: fails(group[2])):
        assert "waited 1 s for ranks 1, 3" in message


def test_data_nobody_fetched_expires() -> None:
    first, second = members(2, data_expiration_seconds=0.3, store_timeout=1)
    first.send_obj(bytes(3 << 20), 1)
    first.expire_data()
    assert len(keys_left(first)) == 4
    time.sleep(0.4)
    first.expire_data()
    assert keys_left(first) == []
    with pytest.raises(RankTimeout):
        second.recv_obj(0)


def test_a_closed_group_says_so() -> None:
    (only,) = members(1)
    only.close()
    only.close()
    with pytest.raises(EngineError, match="closed"):
        only.barrier()


# -- barrier --


def test_nobody_passes_a_barrier_before_the_last_arrives() -> None:
    group = members(3)
    passed: list[int] = []

    def cross(member: ObjectGroup) -> None:
        member.barrier(10)
        passed.append(member.rank)

    threads = [threading.Thread(target=cross, args=(member,)) for member in group[:2]]
    for thread in threads:
        thread.start()
    time.sleep(0.4)
    assert passed == []
    cross(group[2])
    for thread in threads:
        thread.join(10)
    assert sorted(passed) == [0, 1, 2]
    assert keys_left(group[0]) == []


def test_a_barrier_used_again_and_again_never_mistakes_itself_for_the_last_one() -> None:
    group = members(3)
    turns = [0, 0, 0]

    def cross(member: ObjectGroup) -> None:
        for turn in range(30):
            turns[member.rank] = turn
            member.barrier(10)
            assert min(turns) >= turn
            member.barrier(10)

    together(*(lambda member=member: cross(member) for member in group))


def test_a_barrier_names_the_ranks_that_did_not_come() -> None:
    group = members(4)

    def fails(member: ObjectGroup) -> str:
        with pytest.raises(RankTimeout) as caught:
            member.barrier(2)
        return str(caught.value)

    started = time.monotonic()
    messages = together(lambda: fails(group[0]), lambda: fails(group[3]))
    assert any("ranks 1, 2" in message and "3" not in message.split("ranks")[1][:6] for message in messages)
    assert all("1, 2" in message for message in messages), "the later of the two may miss the one that gave up first"
    assert time.monotonic() - started < 10


def test_a_rank_that_comes_after_the_others_gave_up_does_not_pass() -> None:
    first, second = members(2)
    with pytest.raises(RankTimeout, match="rank 1"):
        first.barrier(0.3)
    with pytest.raises(RankTimeout, match="rank 0"):
        second.barrier(0.3)
    together(lambda: first.barrier(10), lambda: second.barrier(10))


# -- the store --


def test_a_taken_port_is_refused_after_a_few_tries() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use \(tried 5 times\)"):
            open_store(HOST, port, is_master=True)


def test_a_port_that_becomes_free_meanwhile_is_taken() -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        threading.Timer(0.5, taken.close).start()
        _, got = open_store(HOST, port, is_master=True)
    assert got == port


def test_a_host_that_is_not_ours_or_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        open_store("192.0.2.1", 0, is_master=True)
    with pytest.raises(ConfigError, match="cannot be resolved"):
        open_store("no-such-host.invalid", 0, is_master=True)


def test_nobody_listening_is_a_timeout_that_says_where() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        port = unused.getsockname()[1]
    with pytest.raises(RankTimeout, match=rf"rank 0's store at 127.0.0.1:{port} within 1 s"):
        open_store(HOST, port, is_master=False, timeout_seconds=1)


def test_a_process_of_another_world_is_refused_and_sees_nothing() -> None:
    store, port = open_store(HOST, 0, is_master=True, token="ours")
    store.set("secret", "1")
    with pytest.raises(ConfigError, match="belongs to another world"):
        open_store(HOST, port, is_master=False, token="theirs", timeout_seconds=1)
    bare = TCPStore(HOST, port, None, False, timedelta(seconds=2), wait_for_workers=False)
    assert not bare.check(["secret"])
    assert not any("ours" in key for key in bare.list_keys())
    inside, _ = open_store(HOST, port, is_master=False, token="ours")
    assert inside.get("secret") == b"1"


def test_the_store_listens_on_the_given_host_only() -> None:
    before = set(listening())
    kept = open_store(HOST, 0, is_master=True)
    assert set(listening()) - before == {(HOST, kept[1])}


def listening() -> list[tuple[str, int]]:
    """Addresses on which this process listens."""
    connections = psutil.Process().net_connections("inet")
    return [(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]


def test_the_check_of_listening_sockets_sees_a_careless_store() -> None:
    kept = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    assert ("::", kept.port) in listening() or ("0.0.0.0", kept.port) in listening()


# -- process groups --


def summed(process_group: Any, rank: int, size: int) -> float:
    group = Group(
        process_group,
        name="test",
        rank=rank,
        ranks=range(size),
        device=torch.device("cpu"),
        timeout_seconds=10,
    )
    return float(group.all_reduce(torch.tensor([float(rank + 1)]))[0])


@contextlib.contextmanager
def ports(count: int) -> Iterator[tuple[int, ...]]:
    """Free ones, kept from being given to a connection of somebody else before the ranks listen there."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind((HOST, 0))
        yield tuple(each.getsockname()[1] for each in held)


def overlapping(seat: Seat, ports: tuple[int, int, int]) -> list[float]:
    """Groups {0, 1, 2}, {0, 1} and {1, 2} at once; used in turn."""
    sums = []
    made = []
    for port, ranks in zip(ports, ([0, 1, 2], [0, 1], [1, 2]), strict=True):
        if seat.rank in ranks:
            place = ranks.index(seat.rank)
            group = init_process_group(HOST, port, place, len(ranks), timeout_seconds=10)
            made.append((group, place, len(ranks)))
    for _ in range(3):
        sums += [summed(*group) for group in made]
    outside = {ip for ip, _ in listening()} - {HOST}
    assert not outside, f"listens on {outside}"
    assert not torch.distributed.is_initialized()
    return sums


def formed_again(seat: Seat, port: int) -> list[float]:
    """The same address and name three times over, then a name three times in one store."""
    sums = []
    for _ in range(3):
        group = init_process_group(HOST, port, seat.rank, seat.size, timeout_seconds=10)
        sums.append(summed(group, seat.rank, seat.size))
        seat.group().all_reduce(torch.zeros(1))  # nobody leaves while another still needs the group
        del group
        seat.group().all_reduce(torch.zeros(1))
    return sums


@pytest.fixture(scope="module")
def trio() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


@pytest.mark.ranks
def test_overlapping_groups_work_side_by_side(trio: Ranks) -> None:
    with ports(3) as three:
        seen = trio.run(overlapping, three)
    assert seen == [[6, 3] * 3, [6, 3, 3] * 3, [6, 3] * 3]


@pytest.mark.ranks
def test_a_destroyed_group_is_formed_again_at_the_same_address(trio: Ranks) -> None:
    with ports(1) as (port,):
        assert trio.run(formed_again, port) == [[6, 6, 6]] * 3


def formed_again_by_name(seat: Seat) -> list[int]:
    sums = []
    for _ in range(3):
        seat._groups.clear()
        sums.append(int(seat.group().all_reduce(torch.tensor([1.0]))[0]))
        seat.group().all_reduce(torch.zeros(1))
        seat.group().close()
    seat._groups.clear()
    return sums


@pytest.mark.ranks
def test_a_closed_group_is_formed_again_under_the_same_name(trio: Ranks) -> None:
    assert trio.run(formed_again_by_name) == [[3, 3, 3]] * 3


def joins_without_its_peer(seat: Seat, port: int) -> str:
    if seat.rank != 0:
        return ""
    with pytest.raises(RankTimeout) as caught:
        init_process_group(HOST, port, 0, 3, timeout_seconds=1)
    return str(caught.value)


@pytest.mark.ranks
def test_a_group_that_cannot_form_names_who_is_missing(trio: Ranks) -> None:
    with ports(1) as (port,):
        message = trio.run(joins_without_its_peer, port)[0]
    assert "forming group 'group' in its rank 0: waited 1 s for ranks 1, 2" in message


# -- tensors --


def test_split_along_the_last_dimension_gives_equal_views() -> None:
    x = torch.arange(24).view(2, 12)
    parts = split_tensor_along_last_dim(x, 3)
    assert torch.equal(torch.cat(parts, -1), x)
    assert all(part.shape == (2, 4) for part in parts)
    assert parts[0].data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match="12 cannot be cut into 5 equal parts"):
        split_tensor_along_last_dim(x, 5)
