"""The store where ranks meet: bound to the given host only, keys under the world's name; waits name ranks.

One client serves one thread at a time: a wait in one thread blocks the calls of the others.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from moe_serve.base.errors import ConfigError, EngineError, RankTimeout
from moe_serve.base.secret import world_name
from moe_serve.base.site import local_address, resolve_host, with_port

__all__ = ["PrefixStore", "Store", "first_line", "found_world", "local_address", "open_store", "wait_for_ranks"]

BIND_ATTEMPTS = 5
HELLO_SECONDS = 10.0


def open_store(
    host: str, port: int, *, is_master: bool, token: str = "", timeout_seconds: float = 300.0
) -> tuple[Store, int]:
    """The world's store and its port. The master binds host:port (0: any free port) and listens there only.

    Every key lies under the world's name, so a process of another world finds nothing here and is refused. torch's
    store asks nobody who he is: nothing secret is in it, and its master makes it deaf once all have met.
    The store lives as long as the master keeps what this returns.
    """
    limit = timedelta(seconds=timeout_seconds)
    if is_master:
        listening = _listen(host, port)
        port = listening.getsockname()[1]
        fd = listening.detach()
        tcp = TCPStore(host, port, None, True, limit, wait_for_workers=False, master_listen_fd=fd)
        world = PrefixStore(f"world {world_name(token)}", tcp)
        world.set("hello", "moe-serve")
        return world, port
    found = _reach(host, port, token, timeout_seconds)
    try:
        found.wait(["hello"], timedelta(seconds=min(HELLO_SECONDS, timeout_seconds)))
    except RuntimeError as error:
        raise ConfigError(
            f"the store at {with_port(host, port)} belongs to another world (its token differs); "
            "choose another address with --data-parallel-address or --data-parallel-master-port"
        ) from error
    return found, port


def found_world(host: str, port: int, *, token: str, timeout_seconds: float = 300.0) -> Store:
    """A world in a store that stands already, opened by somebody else (torchrun's agent): from now on open_store()
    finds it there. Any rank may call this, or all."""
    world = _reach(host, port, token, timeout_seconds)
    world.set("hello", "moe-serve")
    return world


def _reach(host: str, port: int, token: str, timeout_seconds: float) -> Store:
    """What lies under this world's name in somebody else's store; RankTimeout if nobody is there."""
    try:
        tcp = TCPStore(host, port, None, False, timedelta(seconds=timeout_seconds), wait_for_workers=False)
    except (DistNetworkError, RuntimeError) as error:
        raise RankTimeout(
            f"cannot reach rank 0's store at {with_port(host, port)} within {timeout_seconds:g} s: {first_line(error)}"
        ) from error
    return PrefixStore(f"world {world_name(token)}", tcp)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket on this host and port only; a taken port is tried a few times, then refused."""
    family, _, _, _, address = resolve_host(host, port)
    for attempt in range(BIND_ATTEMPTS):
        if attempt:
            time.sleep(0.2 * attempt)
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
            return listening
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE or port == 0:
                raise ConfigError(f"cannot listen on {with_port(host, port)}: {error.strerror}") from error
    raise ConfigError(
        f"port {port} on {host} is in use (tried {BIND_ATTEMPTS} times); give a free one "
        "(--data-parallel-master-port), or 0 for any"
    )


def wait_for_ranks(store: Store, keys: Mapping[int, str], *, timeout: float, what: str) -> None:
    """Wait until every rank's key is in the store; RankTimeout names the ranks whose keys are not."""
    if not keys:
        return
    try:
        store.wait(list(keys.values()), timedelta(seconds=max(timeout, 0.001)))
    except RuntimeError as error:
        try:
            missing = [rank for rank, key in keys.items() if not store.check([key])]
        except RuntimeError as gone:
            raise EngineError(f"{what}: the store is gone ({first_line(gone)})") from error
        if missing:
            names = ", ".join(str(rank) for rank in missing)
            raise RankTimeout(
                f"{what}: waited {round(timeout, 1):g} s for rank{'s' if len(missing) > 1 else ''} {names}"
            ) from error
        if isinstance(error, DistNetworkError):
            raise EngineError(f"{what}: the store is gone ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
