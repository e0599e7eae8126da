"""How conversations and their texts travel between a process and the one that renders for it: a length, then JSON.

JSON of Python's own, since conversations hold what msgpack does not: integers of any size, lone surrogates.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

HEADER = struct.Struct(">Q")


def encode(record: dict[str, Any]) -> bytes:
    """With its length before it. ValueError, TypeError or RecursionError for what JSON does not hold."""
    body = json.dumps(record).encode()
    return HEADER.pack(len(body)) + body


def send(target: socket.socket, frame: bytes, deadline: float) -> None:
    """TimeoutError or OSError if it is not taken by `deadline` (of time.monotonic)."""
    target.settimeout(_left(deadline))
    target.sendall(frame)


def receive(source: socket.socket, deadline: float) -> bytes:
    """The next record's body; EOFError where the other end has closed, TimeoutError after `deadline`."""
    (size,) = HEADER.unpack(_exactly(source, HEADER.size, deadline))
    return _exactly(source, size, deadline)


def _exactly(source: socket.socket, size: int, deadline: float) -> bytes:
    taken = bytearray()
    while len(taken) < size:
        source.settimeout(_left(deadline))
        piece = source.recv(min(size - len(taken), 1 << 20))
        if not piece:
            raise EOFError
        taken += piece
    return bytes(taken)


def _left(deadline: float) -> float | None:
    if deadline == float("inf"):
        return None
    return max(deadline - time.monotonic(), 0.001)
