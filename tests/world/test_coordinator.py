"""The coordinator and real links over loopback: hello, orders, death, silence."""

from __future__ import annotations

import asyncio
import queue
import socket
import time
from collections.abc import Iterator

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, RankTimeout
from moe_serve.base.messages import Hello, Stop, StoreAt, Wake
from moe_serve.base.progress import Progress
from moe_serve.base.topology import Topology
from moe_serve.world.coordinator import Coordinator
from moe_serve.world.link import Link
from tests.support.coordinator import RunningCoordinator

AGREEMENT = Config().agreement()


@pytest.fixture
def running() -> Iterator[RunningCoordinator]:
    made = RunningCoordinator(Topology(dp=2), AGREEMENT)
    yield made
    made.close()


def test_orders_travel_between_members(running: RunningCoordinator) -> None:
    first, heard_first, _ = running.join(0)
    _, heard_second, _ = running.join(1)
    first.send(StoreAt("127.0.0.1", 7))
    assert heard_second.get(timeout=2) == StoreAt("127.0.0.1", 7)
    first.send(Wake(3))
    assert heard_second.get(timeout=2) == Wake(3)
    assert heard_first.empty()


def test_a_wrong_token_is_refused_with_a_sentence(running: RunningCoordinator) -> None:
    with pytest.raises(ConfigError, match="another world"):
        running.join(0, token="guess")


def test_other_options_are_refused_with_the_rank_and_the_fields(running: RunningCoordinator) -> None:
    other = Config.from_flat({"block_size": 32, "all2all_backend": "naive"}).agreement()
    with pytest.raises(ConfigError, match=r"engine dp 1 .* all2all_backend: .*; block_size: 32, not 16"):
        running.join(1, agreement=other)


def test_a_dead_member_is_named_to_the_others_at_once(running: RunningCoordinator) -> None:
    dying, _, _ = running.join(0)
    _, heard, _ = running.join(1)
    started = time.monotonic()
    dying._socket.shutdown(socket.SHUT_RDWR)
    stop = heard.get(timeout=2)
    assert time.monotonic() - started < 1
    assert isinstance(stop, Stop)
    assert "engine dp 0" in stop.reason


def test_a_lost_coordinator_is_noticed_at_once(running: RunningCoordinator) -> None:
    _, _, lost = running.join(0)
    started = time.monotonic()
    running.close()
    assert "gone" in lost.get(timeout=2)
    assert time.monotonic() - started < 1


def test_leaving_is_no_death(running: RunningCoordinator) -> None:
    leaving, _, lost = running.join(0)
    _, heard, _ = running.join(1)
    leaving.close("done")
    with pytest.raises(queue.Empty):
        heard.get(timeout=0.5)
    assert lost.empty()


def test_garbage_on_the_port_disturbs_nobody(running: RunningCoordinator) -> None:
    _, heard, lost = running.join(0)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\5hello", b"\xff" * 64, b""):
        with socket.create_connection(("127.0.0.1", running.port)) as stranger:
            stranger.sendall(garbage)
    time.sleep(0.3)
    assert heard.empty()
    assert lost.empty()


def test_nobody_there_is_said_with_the_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    hello = Hello(role="engine", dp=0, pid=1, host="x")
    with pytest.raises(RankTimeout, match=f"127.0.0.1:{port}"):
        Link(
            "127.0.0.1",
            port,
            hello,
            token="token of a test world",
            on_message=print,
            on_lost=print,
            progress=Progress(),
            connect_seconds=0.5,
        )


def test_a_taken_port_is_a_clear_error(running: RunningCoordinator) -> None:
    async def start_another() -> None:
        await Coordinator(running.coordinator.fleet, token=running.token).start("127.0.0.1", running.port)

    with pytest.raises(ConfigError, match=f"127.0.0.1:{running.port}"):
        asyncio.run(start_another())


def test_three_hundred_that_connect_while_the_coordinator_is_busy_are_all_held(running: RunningCoordinator) -> None:
    made: list[socket.socket] = []
    running.call(lambda: time.sleep(0.5))
    try:
        for _ in range(300):
            made.append(socket.create_connection(("127.0.0.1", running.port), timeout=0.4))
        for each in made:
            each.settimeout(5)
            each.recv(1)  # its nonce, or the end of a line for which there is no room at the door
    finally:
        for each in made:
            each.close()
    deadline = time.monotonic() + 5
    while running.coordinator._tasks and running.coordinator._door._strangers:
        assert time.monotonic() < deadline
        time.sleep(0.02)
