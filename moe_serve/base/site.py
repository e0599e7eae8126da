"""Where a process runs: what it may bind to, and whom it shares its machine with. Knows no torch."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from moe_serve.base.errors import ConfigError


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """One per process, told by whoever started it.

    `address` is this machine's own, on the way to the others: whatever listens for members binds there. `node` names
    the launcher that started this; where a supervisor started several launchers, they share the `machine`. `ranks_here`
    of the machine share its memory and devices; those of this process begin at `local_rank` among them. The first of
    them is `first_worker` of its engine, which may have others on other nodes. `threads` is one rank's share of the
    cores.
    """

    address: str = "127.0.0.1"
    node: str = ""
    machine: str = ""
    ranks_here: int = 1
    local_rank: int = 0
    first_worker: int = 0
    threads: int = 1


def without_brackets(host: str) -> str:
    """An IPv6 address as sockets take it, however it is written."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def with_port(host: str, port: object) -> str:
    """host:port, an IPv6 address in brackets (RFC 3986), as URLs and ZMQ want it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve_host(host: str, port: int) -> tuple[Any, Any, int, str, Any]:
    """The first address of a host; ConfigError if it has none."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} cannot be resolved: {error.strerror}") from error


def local_address(host: str, port: int) -> str:
    """This machine's own address on the way to `host`: where what meets there should listen."""
    family, _, _, _, address = resolve_host(host, port or 1)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)  # sends nothing; only chooses the route
        except OSError as error:
            raise ConfigError(
                f"this machine has no route to {host} ({error.strerror}); give an address that it can reach "
                "(--data-parallel-address)"
            ) from error
        # With its scope, where it is an address of one link only.
        return socket.getnameinfo(probe.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def bound_socket(host: str, port: int) -> socket.socket:
    """At the HTTP port (0: any free one), not listening yet: who connects is refused. ConfigError if it is taken."""
    with naming_http_port(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
        return made


@contextlib.contextmanager
def naming_http_port(host: str, port: int) -> Iterator[None]:
    """A port that is taken, or an address that is not ours, is the operator's mistake."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the HTTP server cannot listen on {with_port(host, port)}: {error.strerror or error} "
            "(options --host and --port)"
        ) from error
