"""What is to be written to one member: never more than the line takes, never more than a bound waiting.

A transport would take everything at once and copy it; here it waits in pieces that are written as the line drains.
"""

from __future__ import annotations

import asyncio
from collections import deque

from moe_serve.base.parcel import Parcel

SMALL_BYTES = 1 << 16
MAX_WAITING_BYTES = 1 << 28
"""Four of the largest frames: who reads so slowly does not keep up."""


class Outbox:
    """`put()` frames, `run()` writes them. All methods belong to one event loop.

    `turns` are shared by all outboxes of a loop: thousands of lines that are ready at once must not be one long turn.
    """

    def __init__(
        self, writer: asyncio.StreamWriter, turns: asyncio.Semaphore, *, limit: int = MAX_WAITING_BYTES
    ) -> None:
        self._writer = writer
        self._turns = turns
        self._limit = limit
        self._frames: deque[Parcel] = deque()
        self._waiting = 0
        self._writing = False
        self._wake = asyncio.Event()
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
        if urgent:
            self._waiting -= sum(len(each) for each in self._frames)
            self._frames.clear()
        self._closing = close
        if len(frame) <= SMALL_BYTES and not self._frames and not self._writing:
            self._writer.write(frame.join())  # a farewell is with the kernel when this returns
            if close:
                self._writer.close()
            return
        if urgent and close and self._writing:
            self._writer.transport.abort()  # it does not read: a closed line tells it enough
            return
        self._frames.append(frame)
        self._waiting += len(frame)
        self._wake.set()

    async def run(self) -> None:
        """Write for ever; OSError when the line breaks."""
        while True:
            while self._frames:
                await self._write(self._frames.popleft())
            if self._closing:
                self._writer.close()
            self._wake.clear()
            await self._wake.wait()

    async def _write(self, frame: Parcel) -> None:
        self._writing = True
        for piece in frame:
            async with self._turns:
                self._writer.write(piece)
                await asyncio.sleep(0)
            await self._writer.drain()
            self._waiting -= len(piece)
        self._writing = False
