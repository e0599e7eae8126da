"""Whoever can reach a world's ports and knows nothing: which ports there are, what is sent to them, how they knock."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterable

import psutil

CONNECT_SECONDS = 0.2
MAX_HELD = 20
PAUSE_SECONDS = 0.002
OPENINGS = (
    b"",
    b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE".ljust(64, b"\0"),
    b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL".ljust(64, b"\0"),
    struct.pack(">I", 1 << 31),
    struct.pack(">I", 7) + b"\x81\xa4type",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x91" * 5000,
)


def listening_ports(processes: Iterable[psutil.Process]) -> list[int]:
    """Every TCP port that one of these processes listens on; those that end meanwhile have none."""
    found: set[int] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    return sorted(found)


def garbage(chance: random.Random) -> bytes:
    """Random bytes, beginnings of what each kind of port expects, and lengths that promise too much."""
    return chance.choice(OPENINGS) + chance.randbytes(chance.choice([0, 1, 30, 64, 3000, 1 << 16]))


def knock(port: int, stop: threading.Event, *, pause: float = PAUSE_SECONDS) -> int:
    """Connect, send something, hang up or hold on for a while, until told to stop.

    How often somebody answered the connect.
    """
    chance, came_in = random.Random(port), 0
    held: list[socket.socket] = []
    while not stop.wait(pause):
        with contextlib.suppress(OSError):
            made = socket.create_connection(("127.0.0.1", port), timeout=CONNECT_SECONDS)
            held.append(made)
            came_in += 1
            made.settimeout(CONNECT_SECONDS)
            made.sendall(garbage(chance))
        if len(held) > MAX_HELD:
            _let_go(held)
    _let_go(held)
    return came_in


def _let_go(held: list[socket.socket]) -> None:
    for made in held:
        made.close()
    held.clear()
