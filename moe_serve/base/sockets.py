"""How every ZMQ socket of a world is set up: who does not know the world's token cannot be heard on it.

CURVE (RFC 26) with one key pair that all members derive from the token. Its public half is no less secret: without it
nobody can say so much as a hello that libzmq would accept, and nothing that he sends reaches a decoder.
"""

from __future__ import annotations

from typing import Any, TypeVar

import zmq
from zmq.utils import z85

from moe_serve.base.errors import MissingExtra
from moe_serve.base.secret import derive

HANDSHAKE_MILLISECONDS = 5_000
"""Who connects and says nothing is dropped after this long."""
SILENCE_MILLISECONDS = 5_000
"""A peer that is stopped, or whose host has vanished without a word, is given up after this long."""
BEAT_MILLISECONDS = 1_000
QUEUED_MESSAGES = 10_000
"""For each peer and direction. Steps are answered one by one; only a peer that does not read comes near it."""

SomeSocket = TypeVar("SomeSocket", bound=zmq.Socket[Any])


def prepare(socket: SomeSocket, token: str, *, listens: bool, max_bytes: int = -1) -> SomeSocket:
    """Before it binds or connects. `max_bytes` of one frame that it takes (-1: any)."""
    if not zmq.has("curve"):
        raise MissingExtra("this pyzmq was built without CURVE, which keeps strangers out: pip install pyzmq")
    secret = z85.encode(derive(token, "curve"))
    public = zmq.curve_public(secret)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    if listens:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, public)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, BEAT_MILLISECONDS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MILLISECONDS)
    return socket
