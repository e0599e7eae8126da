"""What is to be written to one member: never more than the line takes, never more than a bound waiting.

A transport would take everything at once and copy it; here it waits in pieces that are written as the line drains, and
a few lines at a time, so that thousands of members that are told something large do not make one long turn of the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque

from moe_serve.base.parcel import Parcel

SMALL_BYTES = 1 << 16
WRITES_PER_TURN = 8
"""Pieces that go to sockets in one turn of the loop: about a millisecond of it."""
MAX_WAITING_BYTES = 1 << 28
"""Four of the largest frames: who reads so slowly does not keep up."""


class Turns:
    """Shares the turns of one event loop among its outboxes, first come first served."""

    def __init__(self) -> None:
        self._queue: deque[asyncio.Event] = deque()
        self._somebody = asyncio.Event()

    def ask(self, turn: asyncio.Event) -> None:
        """Set the event when it is its turn."""
        self._queue.append(turn)
        self._somebody.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._somebody.wait()
            for _ in range(min(WRITES_PER_TURN, len(self._queue))):
                self._queue.popleft().set()
            if not self._queue:
                self._somebody.clear()
            await asyncio.sleep(0)


class Outbox:
    """`put()` frames, `run()` writes them. All methods belong to one event loop."""

    def __init__(self, writer: asyncio.StreamWriter, turns: Turns, *, limit: int = MAX_WAITING_BYTES) -> None:
        self._writer = writer
        self._turns = turns
        self._limit = limit
        self._frames: deque[Parcel] = deque()
        self._begun: deque[bytes | memoryview] = deque()
        """The rest of a frame that the other side has seen a part of."""
        self._waiting = 0
        self._turn = asyncio.Event()
        self._busy = False
        self._closing = False

    @property
    def waiting_bytes(self) -> int:
        return self._waiting

    @property
    def is_full(self) -> bool:
        return self._waiting > self._limit

    def put(self, frame: Parcel, *, urgent: bool = False, close: bool = False) -> None:
        """One more frame, the last one with `close`. An `urgent` one replaces all that is not begun."""
        if self._closing or self._writer.is_closing():
            return
        self._closing = close
        if urgent:
            self._waiting -= sum(len(each) for each in self._frames)
            self._frames.clear()
            if close and self._busy:
                self._writer.transport.abort()  # it does not read: a closed line tells it enough
                return
        if len(frame) <= SMALL_BYTES and not self._busy:
            self._writer.write(frame.join())  # a farewell is with the kernel when this returns
            if close:
                self._writer.close()
            return
        self._frames.append(frame)
        self._waiting += len(frame)
        if not self._busy:
            self._busy = True
            self._turns.ask(self._turn)

    async def run(self) -> None:
        """Write for ever, a piece in each turn; OSError when the line breaks."""
        while True:
            await self._turn.wait()
            self._turn.clear()
            await self._write_piece()
            self._busy = bool(self._begun or self._frames)
            if self._busy:
                self._turns.ask(self._turn)
            elif self._closing:
                self._writer.close()

    async def _write_piece(self) -> None:
        if not self._begun and self._frames:
            self._begun.extend(self._frames.popleft())
        if self._begun:
            piece = self._begun.popleft()
            self._writer.write(piece)
            await self._writer.drain()
            self._waiting -= len(piece)
