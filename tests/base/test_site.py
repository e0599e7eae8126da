"""Addresses as people, sockets, URLs and ZMQ write them."""

from __future__ import annotations

import socket

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.site import bound_socket, local_address, with_port, without_brackets
from tests.support.ipv6 import why_no_ipv6


@pytest.mark.parametrize(
    ("given", "host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:80"),
        ("node-1", "node-1", "node-1:80"),
        ("::1", "::1", "[::1]:80"),
        ("[::1]", "::1", "[::1]:80"),
        ("[fe80::1%eth0]", "fe80::1%eth0", "[fe80::1%eth0]:80"),
    ],
)
def test_an_ipv6_address_has_brackets_beside_a_port_and_nowhere_else(given: str, host: str, shown: str) -> None:
    assert without_brackets(given) == host
    assert with_port(host, 80) == shown
    config = Config.from_flat({"host": given, "data_parallel_address": given})
    assert (config.server.host, config.parallel.data_parallel_address) == (host, host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_way_to_this_machine_begins_at_its_own_address(host: str) -> None:
    if host == "::1" and (why := why_no_ipv6()):
        pytest.skip(why)
    assert local_address(host, 0) == host


def test_a_port_is_held_before_anybody_listens_and_one_that_is_taken_is_named() -> None:
    with bound_socket("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        held.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: .* in use \(options --host and"):
            bound_socket("127.0.0.1", port)
