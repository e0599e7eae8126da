"""Ports opened for the other doctor to try, and ports of the other that are tried: all at once, each with a bound.

A port counts as reached only if the very doctor at its other end answers there: both show what only the two ends of
their line can know (`Line.secret`), so that nothing between them, and no stranger, answers in its place.
"""

from __future__ import annotations

import errno
import hmac
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from moe_serve.base.secret import PROOF_BYTES, derive

MAX_PORTS = 16
TRY_SECONDS = 3.0
RANDOM_PORTS = 3


class Tried(msgspec.Struct, frozen=True):
    """What became of one connection; `outcome` one of OUTCOMES, `why` in the system's words."""

    port: int
    outcome: str
    why: str = ""


OUTCOMES = ("open", "refused", "silent", "no route", "held", "stranger", "failed")


def outcome_of(error: OSError) -> str:
    """What a failed connection tells of the way."""
    if isinstance(error, TimeoutError):
        return "silent"
    kinds = {
        errno.ECONNREFUSED: "refused",
        errno.ETIMEDOUT: "silent",
        errno.ENETUNREACH: "no route",
        errno.EHOSTUNREACH: "no route",
        errno.EACCES: "no route",
        errno.EPERM: "no route",
        errno.EINVAL: "no route",  # a blackhole route of Linux
        errno.EADDRINUSE: "held",
    }
    return kinds.get(error.errno or 0, "failed")


class OpenPorts:
    """Listens at `address` on so many random ports and on the `chosen` ones; `close()` it. `failed` could not be."""

    def __init__(self, address: str, chosen: Sequence[int], secret: bytes, *, num_random: int = RANDOM_PORTS) -> None:
        self._secret = secret
        self._listening: list[socket.socket] = []
        self._closing = threading.Event()
        self.failed: list[Tried] = []
        for port in [*chosen, *[0] * num_random][:MAX_PORTS]:
            try:
                self._listening.append(socket.create_server((address, port), family=_family(address)))
            except OSError as error:
                self.failed.append(Tried(port, outcome_of(error), error.strerror or str(error)))
        self._threads = [threading.Thread(target=self._answer, args=(each,), daemon=True) for each in self._listening]
        for thread in self._threads:
            thread.start()

    @property
    def ports(self) -> list[int]:
        return [int(each.getsockname()[1]) for each in self._listening]

    def close(self) -> None:
        self._closing.set()
        for each in self._threads:
            each.join(1.0)
        for listening in self._listening:
            listening.close()

    def _answer(self, listening: socket.socket) -> None:
        """One after the other; who does not show the secret is closed."""
        listening.settimeout(0.1)
        port = int(listening.getsockname()[1])
        while not self._closing.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                continue
            with connection:
                try:
                    connection.settimeout(TRY_SECONDS)
                    if hmac.compare_digest(_read(connection), _proof(self._secret, "try", port)):
                        connection.sendall(_proof(self._secret, "answer", port))
                except OSError:
                    continue


def try_ports(address: str, ports: Sequence[int], secret: bytes, seconds: float = TRY_SECONDS) -> list[Tried]:
    """All of them at once, so that it takes no longer than one."""
    if not ports:
        return []
    with ThreadPoolExecutor(len(ports[:MAX_PORTS])) as pool:
        return list(pool.map(lambda port: _try(address, port, secret, seconds), ports[:MAX_PORTS]))


def _try(address: str, port: int, secret: bytes, seconds: float) -> Tried:
    deadline = time.monotonic() + seconds
    try:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            connection.sendall(_proof(secret, "try", port))
            answered = hmac.compare_digest(_read(connection), _proof(secret, "answer", port))
            return Tried(port, "open") if answered else Tried(port, "stranger", "somebody else answers there")
    except OSError as error:
        return Tried(port, outcome_of(error), error.strerror or str(error))


def _read(connection: socket.socket) -> bytes:
    parts = bytearray()
    while len(parts) < PROOF_BYTES:
        part = connection.recv(PROOF_BYTES - len(parts))
        if not part:
            break
        parts += part
    return bytes(parts)


def _proof(secret: bytes, purpose: str, port: int) -> bytes:
    return derive(secret.hex(), f"doctor {purpose}", port.to_bytes(2, "big"))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
