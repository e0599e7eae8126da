"""Answers that end when the client goes away: starlette notices only when it writes, and an engine may be slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


async def unless_disconnected(request: Request, work: Coroutine[None, None, Result]) -> Result | None:
    """The result of `work`, or None, with `work` cancelled, when the client leaves first. The body must be read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _end(working, leaving)


class EventStream(Response):
    """Server-sent events. `on_close` always runs, however the stream ends, and before the next request."""

    def __init__(
        self, events: AsyncIterator[bytes], *, headers: Mapping[str, str], on_close: Callable[[], Awaitable[None]]
    ) -> None:
        self._events = events
        self._on_close = on_close
        self.status_code = 200
        self.media_type = "text/event-stream"
        self.background = None
        # Proxies must pass each event on at once.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_until_disconnected(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                # A write to a client that has just left is no failure of ours.
                with suppress(OSError):
                    writing.result()
        finally:
            await _end(writing, leaving)
            await self._on_close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Result] | asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
