"""The members of a world of `bench.scale`: thousands of lines to one coordinator, in one process.

What a Link does with two threads, a protocol does here on one event loop; the bytes are the same.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from moe_serve.base.messages import FromMember, Hello
from moe_serve.base.secret import NONCE_BYTES, PROOF_BYTES
from moe_serve.world.handshake import answer_challenge, is_coordinator
from moe_serve.world.link import HEADER, frame

KEPT_BYTES = 256
"""Of a record: enough for its tag and its first field. Orders of megabytes for thousands are counted, not kept."""
CONNECT_SECONDS = 60.0
RETRY_SECONDS = 0.2
_EPOCH = b"\xa5epoch"
Hear = Callable[["Line", str, bytes], None]


@dataclass(slots=True)
class Tally:
    """What went over the lines, by tag where it came from the coordinator. Bytes with their frames."""

    heard: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    bytes_heard: int = 0
    bytes_sent: int = 0
    total_sent: int = 0
    """Ever, not since `begin()`."""

    def begin(self) -> None:
        """Count anew."""
        self.heard.clear()
        self.sent = self.bytes_heard = self.bytes_sent = 0


class Line(asyncio.Protocol):
    """One member: proves that it knows the token, says hello, and gives every record to `hear`."""

    def __init__(self, hello: Hello, token: str, tally: Tally, hear: Hear) -> None:
        self.hello = hello
        self.lost = False
        self.welcomed = asyncio.get_running_loop().create_future()
        self._token = token
        self._tally = tally
        self._hear = hear
        self._buffer = bytearray()
        self._missing = 0
        self._head: bytes | None = None
        self._nonce = self._answer = b""
        self._proved = False
        self._transport: asyncio.Transport | None = None

    def send(self, message: FromMember) -> None:
        """A record to the coordinator."""
        self._write(frame(message))
        self._tally.sent += 1
        self._tally.total_sent += 1

    def close(self) -> None:
        """As a process that is gone."""
        assert self._transport is not None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.welcomed.done():
            self.welcomed.set_exception(exc or ConnectionError("closed before it was welcome"))

    def data_received(self, data: bytes) -> None:
        self._tally.bytes_heard += len(data)
        if self._missing > len(data):
            self._missing -= len(data)
            return
        self._buffer += memoryview(data)[self._missing :]
        if self._missing:
            self._missing = 0
            self._take(self._head or b"")
        self._prove() if not self._proved else self._read()

    def _prove(self) -> None:
        if not self._nonce and len(self._buffer) >= NONCE_BYTES:
            self._nonce = bytes(self._buffer[:NONCE_BYTES])
            del self._buffer[:NONCE_BYTES]
            self._answer = answer_challenge(self._token, self._nonce)
            self._write(self._answer)
        elif self._nonce and len(self._buffer) >= PROOF_BYTES:
            self._proved = is_coordinator(self._token, self._nonce, self._answer, bytes(self._buffer[:PROOF_BYTES]))
            assert self._proved
            del self._buffer[:PROOF_BYTES]
            self.send(self.hello)
            self._read()

    def _read(self) -> None:
        """Whole records; of one that is not here yet the beginning, its rest only counted."""
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            here = len(self._buffer) - HEADER.size
            if here < min(length, KEPT_BYTES):
                return
            head = bytes(self._buffer[HEADER.size : HEADER.size + min(length, KEPT_BYTES)])
            if here < length:
                self._head, self._missing = head, length - here
                self._buffer.clear()
                return
            del self._buffer[: HEADER.size + length]
            self._take(head)

    def _take(self, head: bytes) -> None:
        tag = tag_of(head)
        self._tally.heard[tag] += 1
        if not self.welcomed.done():
            if tag == "welcome":
                self.welcomed.set_result(None)
            else:
                self.welcomed.set_exception(RuntimeError(f"{self.hello.role} {self.hello.dp} got {head!r}"))
        self._hear(self, tag, head)

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)
        self._tally.bytes_sent += len(data)


def tag_of(head: bytes) -> str:
    """The tag of a record from its first bytes: msgspec writes it as the first pair of a short map."""
    if head[1:6] != b"\xa4type" or head[6] & 0xE0 != 0xA0:
        raise ValueError(f"no record of a coordinator begins so: {head[:40]!r}")
    return head[7 : 7 + (head[6] & 0x1F)].decode()


def epoch_of(head: bytes) -> int:
    """Of an order about experts, from its first bytes; epochs of a measured world are small."""
    epoch = head[head.index(_EPOCH) + len(_EPOCH)]
    if epoch > 0x7F:
        raise ValueError(f"an epoch above {0x7F} is not read here")
    return epoch


class Crowd:
    """Many lines. `hear` is called for every record that any of them gets."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self.tally = Tally()
        self.lines: list[Line] = []
        self.retries = 0
        self.hear: Hear = _nothing
        self._make = partial(asyncio.get_running_loop().create_connection, host=host, port=port)
        self._token = token

    async def join(self, hellos: list[Hello]) -> None:
        """All at once; who is not let in tries again, as a Link does."""
        await asyncio.gather(*(self._join(hello) for hello in hellos))
        self.lines.sort(key=lambda line: (line.hello.role, line.hello.dp))

    def close(self) -> None:
        """Drop all lines."""
        for line in self.lines:
            if not line.lost:
                line.close()

    async def _join(self, hello: Hello) -> None:
        async with asyncio.timeout(CONNECT_SECONDS):
            while True:
                try:
                    line = Line(hello, self._token, self.tally, self._pass_on)
                    await self._make(lambda line=line: line)
                    await line.welcomed
                except OSError:
                    self.retries += 1
                    await asyncio.sleep(RETRY_SECONDS)
                else:
                    self.lines.append(line)
                    return

    def _pass_on(self, line: Line, tag: str, head: bytes) -> None:
        self.hear(line, tag, head)


def _nothing(_line: Line, _tag: str, _head: bytes) -> None:
    """What nobody asked for."""
