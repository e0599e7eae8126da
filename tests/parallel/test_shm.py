"""Memory shared by ranks: handed to ranks only, whole or not at all, bounded waits that name who is gone or silent."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from moe_serve.base.errors import EngineError, NoSharedMemory, RankTimeout
from moe_serve.base.topology import Topology
from moe_serve.parallel.groups import build_groups
from moe_serve.parallel.memory_handover import HELLO, Giver, make_memory, take
from moe_serve.parallel.shm import SharedMemory, share
from tests.support.ranks import RankFailed, Ranks, Seat

pytestmark = pytest.mark.ranks
PAGE = 4096
MANY = 300
PATIENCE_SECONDS = 1.5


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def many_numbers(seat: Seat, size: int) -> int:
    """Every rank writes to a place of its own and adds up everybody's; two places in turn, no barrier between."""
    memory = share(seat.group(size), 2 * size * 8)
    places, total = memory.data[: 2 * size * 8].view(torch.int64).view(2, size), 0
    for number in range(1, MANY + 1):
        places[number % 2, seat.rank] = number * (seat.rank + 1)
        memory.publish(number)
        if number % 50 == seat.rank:
            time.sleep(0.004)  # long enough for the others to fall asleep
        memory.wait(number, "a sum")
        assert memory.have_come(number)
        total += int(places[number % 2].sum())
    memory.close()
    memory.close()
    return total


@pytest.mark.parametrize("size", [2, 4])
def test_numbers_arrive_after_what_was_written_before_them(ranks: Ranks, size: int) -> None:
    expected = MANY * (MANY + 1) // 2 * size * (size + 1) // 2
    assert ranks.run(many_numbers, size, only=size) == [expected] * size


def no_room(seat: Seat) -> tuple[str, set[str]]:
    group = seat.group(2)
    group.all_reduce(torch.zeros(1))
    before = descriptors()
    with pytest.raises(NoSharedMemory) as caught:
        share(group, 1 << 60)
    return str(caught.value), descriptors() - before


def test_memory_that_cannot_be_had_is_an_error_on_all_ranks_and_leaves_nothing_open(ranks: Ranks) -> None:
    for message, left in ranks.run(no_room, only=2):
        assert message == "rank 0 cannot have it: Cannot allocate memory"
        assert left == set()


def mapping_fails(seat: Seat) -> str:
    """On one rank only: the others hear of it."""
    group = seat.group(3)
    if seat.rank == 1:
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE + (1 << 25), before[1]))
    try:
        share(group, 1 << 27)
    except NoSharedMemory as error:
        return str(error)
    finally:
        if seat.rank == 1:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return ""


def test_a_rank_that_cannot_map_it_is_named_on_all(ranks: Ranks) -> None:
    assert ranks.run(mapping_fails, only=3) == ["rank 1 cannot have it: Cannot allocate memory"] * 3


def test_memory_can_neither_shrink_nor_grow() -> None:
    memory = make_memory("moe-serve-test", PAGE)
    try:
        for size in (0, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(memory, size)
    finally:
        os.close(memory)


def test_strangers_get_nothing_and_keep_nobody_waiting() -> None:
    before = descriptors()
    giver = Giver(PAGE, 2)
    address, silent, lying = giver.offer.address, *(socket.socket(socket.AF_UNIX) for _ in range(2))
    got: list[object] = []
    deadline = time.monotonic() + 10
    with silent, lying:
        silent.connect(address)
        lying.connect(address)
        lying.sendall(HELLO.pack(bytes(32), 1))
        taking = threading.Thread(target=lambda: got.append(take(giver.offer, 1, 2, deadline)))
        taking.start()
        own = giver.give(deadline)
        taking.join()
        assert lying.recv(1) == b""
    giver.close()
    (theirs,) = got
    assert os.fstat(own.memory).st_ino == os.fstat(theirs.memory).st_ino  # type: ignore[attr-defined]
    own.close()
    theirs.close()  # type: ignore[attr-defined]
    assert descriptors() == before
    with pytest.raises(OSError, match="refused") as caught:
        take(giver.offer, 1, 2, deadline)
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_rank_that_does_not_fetch_it_is_named_in_time() -> None:
    giver = Giver(PAGE, 3)
    with pytest.raises(TimeoutError, match="ranks 1, 2 did not fetch"):
        giver.give(time.monotonic() + 0.1)
    giver.close()


def stops_and_dies(seat: Seat, folder: str) -> None:
    """Rank 2 stops and is then killed; the others hear of both, who it was, and in time."""
    groups = build_groups(
        Topology(dp=3),
        seat.rank,
        store_host=seat.host,
        store_port=seat.port,
        token=seat.token,
        device=torch.device("cpu"),
        timeout_seconds=30,
    )
    pids = groups.world.all_gather(torch.tensor([os.getpid()])).tolist()
    memory = share(groups.world, PAGE)
    held = [os.readlink(f"/proc/self/fd/{name}") for name in descriptors() if os.path.exists(f"/proc/self/fd/{name}")]
    held = [target for target in held if "memfd:moe-serve" in target]
    Path(folder, str(seat.rank)).write_text("\n".join(held))
    memory.publish(1)
    memory.wait(1, "a step")
    groups.world.timeout_seconds = PATIENCE_SECONDS  # not for meeting, which takes longer on a busy machine
    if seat.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    memory.publish(2)
    hears(memory, RankTimeout, "timed out waiting for rank 2", PATIENCE_SECONDS + 1)
    if seat.rank == 0:
        os.kill(pids[2], signal.SIGKILL)
    time.sleep(0.3)
    hears(memory, EngineError, "the process of rank 2 has left", 0.5)
    memory.wait(1, "what it had published before")


def hears(memory: SharedMemory, kind: type[EngineError], words: str, within: float) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError) as caught:
        memory.wait(2, "a step")
    assert type(caught.value) is kind, caught.value
    assert words in str(caught.value)
    assert "a step in group 'world' failed on rank" in str(caught.value)
    assert time.monotonic() - started < within


@pytest.mark.long
def test_a_stopped_peer_and_a_killed_one_are_named_and_no_memory_is_left(tmp_path: Path) -> None:
    with Ranks(3) as three, pytest.raises(RankFailed) as caught:
        three.run(stops_and_dies, str(tmp_path))
    assert str(caught.value) == "rank 2:\nthe process is gone"
    names = {line for rank in range(3) for line in (tmp_path / str(rank)).read_text().splitlines()}
    assert len(names) == 1, "one memory, whoever holds it"
    links = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            links.append(os.readlink(link))
        except OSError:
            continue
    assert names.isdisjoint(links)
    assert not list(Path("/dev/shm").glob("*moe*serve*"))
