"""A deaf listener answers nobody, and what was connected stays so."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import psutil
import pytest
import torch

from moe_serve.parallel.listeners import deafen, listeners
from tests.support.ranks import Ranks, Seat

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux filters sockets so")


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["IPv4", "IPv6"]
)
def test_a_deaf_listener_answers_nobody_and_keeps_what_is_connected(family: socket.AddressFamily, host: str) -> None:
    before = listeners()
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen()
        assert listeners() - before == {listening.fileno()}
        address = listening.getsockname()[:2]
        with socket.create_connection(address) as here:
            there, _ = listening.accept()
            with there:
                deafen([listening.fileno()])
                with pytest.raises(TimeoutError):
                    socket.create_connection(address, timeout=0.3)
                here.sendall(b"still here")
                assert there.recv(100) == b"still here"


def test_looking_for_listeners_leaves_no_descriptor_open() -> None:
    process = psutil.Process(os.getpid())
    before = process.num_fds()
    for _ in range(10):
        listeners()
    assert process.num_fds() == before


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def knock_and_reduce(seat: Seat) -> tuple[int, float]:
    """How many listeners of a rank with a group still answer; and the group works after all that knocking."""
    group = seat.group()
    group.all_reduce(torch.zeros(1))
    own = [each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    answering = 0
    for each in own:
        try:
            socket.create_connection(each.laddr, timeout=0.3).close()
            answering += 1
        except TimeoutError:
            continue
    assert own, "gloo does listen"
    return answering, float(group.all_reduce(torch.ones(1)))


@pytest.mark.ranks
def test_nobody_can_knock_at_a_group_that_stands(pair: Ranks) -> None:
    assert pair.run(knock_and_reduce) == [(0, 2.0), (0, 2.0)]
