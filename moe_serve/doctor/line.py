"""A line between two doctors: one TCP connection, on which both first prove what they know; records and bulk follow.

The proof is that of members at their coordinator (world/handshake.py): the world's token never travels, and who does
not know it reads a nonce and a refusal, nothing else. Doctors without a token use a word that everybody knows. Every
wait ends at a deadline, and no record is longer than MAX_RECORD.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from moe_serve.base.messages import UNREADABLE
from moe_serve.base.secret import NONCE_BYTES, PROOF_BYTES, derive, new_nonce
from moe_serve.world.handshake import ANSWER_BYTES, REFUSAL, answer_challenge, is_coordinator, judge_answer
from moe_serve.world.link import HEADER, PROOF_SECONDS

OPEN_TOKEN = "a doctor without a token"
MAX_RECORD = 1 << 16
CHUNK = 1 << 16
Record = TypeVar("Record")


class LineError(Exception):
    """The line broke, was silent for too long, or carried what is no record."""


class NotTheSameToken(LineError):
    """The other side does not know our token, or we not its."""


class Line:
    """`send` and `receive` records, `push` and `pull` bulk; LineError once `deadline` (monotonic) has passed.

    `secret` is of this line alone, known to both ends and to nobody without the token.
    """

    def __init__(self, connection: socket.socket, secret: bytes, deadline: float) -> None:
        self.socket = connection
        self.secret = secret
        self.deadline = deadline

    def send(self, record: object) -> None:
        body = msgspec.msgpack.encode(record)
        self.push(HEADER.pack(len(body)) + body)

    def receive(self, decoder: msgspec.msgpack.Decoder[Record]) -> Record:
        (length,) = HEADER.unpack(self._exactly(HEADER.size))
        if length > MAX_RECORD:
            raise LineError(f"a record of {length} bytes is longer than {MAX_RECORD}")
        try:
            return decoder.decode(self._exactly(length))
        except UNREADABLE as error:
            raise LineError(f"no record of ours: {error}") from error

    def push(self, data: bytes) -> None:
        self._bound(lambda: self.socket.sendall(data))

    def push_zeros(self, count: int) -> None:
        """So many bytes."""
        piece = bytes(min(CHUNK, count))
        while count > 0:
            self.push(piece[:count])
            count -= len(piece)

    def pull(self, count: int, seconds: float) -> int:
        """Read so many bytes and forget them; how many came within so many seconds."""
        got, until = 0, time.monotonic() + seconds
        with contextlib.suppress(LineError):
            while got < count and (part := self._some(min(CHUNK, count - got), until)):
                got += len(part)
        return got

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._some(count - len(parts))
            if not part:
                raise LineError("the other side closed the line")
            parts += part
        return bytes(parts)

    def _some(self, count: int, until: float = math.inf) -> bytes:
        return self._bound(lambda: self.socket.recv(count), until)

    def _bound(self, act: Callable[[], Record], until: float = math.inf) -> Record:
        left = min(self.deadline, until) - time.monotonic()
        if left <= 0:
            raise LineError("timed out")
        self.socket.settimeout(left)
        try:
            return act()
        except OSError as error:
            raise LineError(error.strerror or str(error)) from error


def call(connection: socket.socket, token: str, deadline: float) -> Line:
    """The calling end of a line, after the proof."""
    line = Line(connection, b"", min(deadline, time.monotonic() + PROOF_SECONDS))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    nonce = line._exactly(NONCE_BYTES)
    answer = answer_challenge(token, nonce)
    line.push(answer)
    if not is_coordinator(token, nonce, answer, line._exactly(PROOF_BYTES)):
        raise NotTheSameToken("the other side does not know the same token")
    return Line(connection, derive(token, "doctor", nonce, answer[:NONCE_BYTES]), deadline)


def answer_call(connection: socket.socket, token: str, deadline: float) -> Line:
    """The listening end. Who does not know the token is told nothing but that."""
    line = Line(connection, b"", min(deadline, time.monotonic() + PROOF_SECONDS))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    nonce = new_nonce()
    line.push(nonce)
    answer = line._exactly(ANSWER_BYTES)
    verdict = judge_answer(token, nonce, answer)
    line.push(verdict)
    if verdict == REFUSAL:
        raise NotTheSameToken("who called does not know this token")
    return Line(connection, derive(token, "doctor", nonce, answer[:NONCE_BYTES]), deadline)
