"""The size and the pace of bodies. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.api.errors import problem_of
from moe_serve.api.orders import ORDERS, header
from moe_serve.base.config import ServerSection
from moe_serve.base.errors import BodyTooLarge, BodyTooSlow, Overloaded

DROP_FACTOR = 4  # how often the limit is read and dropped of a body that was refused
DROP_SECONDS = 5.0
ORDER_BYTES = 8 * 2**20  # a placement of 60 layers on 2,048 ranks
OTHER_BYTES = 2**16
PACE = 2**14
"""Bytes of a body that earn it one more second."""


class LimitBody:
    """Refuses bodies over their route's limit: by their announced length at once, else as soon as too much has arrived.

    Also those that come too slowly, and any more while unfinished ones hold too much memory together.
    """

    def __init__(self, app: ASGIApp, server: ServerSection) -> None:
        self._app = app
        self._server = server
        self._unfinished = UnfinishedBodies(server.max_unfinished_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope)
        exchange = _LimitedExchange(receive, send, limit, self._server.timeout_body, self._unfinished)
        announced = header(scope, b"content-length")
        try:
            if announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
                await problem_of(exchange.refuse()).answer(scope, receive, exchange.send)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        finally:
            exchange.let_go()

    def _limit(self, scope: Scope) -> int:
        server = self._server
        if scope["method"] != "POST":
            return min(OTHER_BYTES, server.max_body_bytes)
        if scope["path"].startswith(ORDERS):
            return min(ORDER_BYTES, server.max_body_bytes)
        return server.max_body_bytes


class UnfinishedBodies:
    """Bytes of bodies that have not arrived whole, of all connections."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    def take(self, size: int) -> None:
        """Hold so much more; Overloaded if that is too much."""
        if size and self._held + size > self._limit:
            raise Overloaded(
                f"bodies that have not arrived whole hold {self._held} bytes already "
                "(server option --max-unfinished-body-bytes)",
                reason="unfinished_bodies",
            )
        self._held += size

    def give(self, size: int) -> None:
        self._held -= size


class _LimitedExchange:
    """One request and its response. After a refusal the rest of the body is read and dropped for a while before the
    connection is closed: clients that write first and read then would see a broken connection instead of the answer.
    """

    def __init__(
        self, receive: Receive, send: Send, max_bytes: int, seconds: float, unfinished: UnfinishedBodies
    ) -> None:
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._unfinished = unfinished
        self._began = time.monotonic()
        self._received = 0
        self._held = 0
        self._whole = False
        self._refused = False

    def refuse(self) -> BodyTooLarge:
        self._refused = True
        return BodyTooLarge(
            f"the body is larger than {self._max_bytes} bytes, this route's limit (server option --max-body-bytes)"
        )

    def let_go(self) -> None:
        """Nothing of this body is unfinished any more."""
        self._unfinished.give(self._held)
        self._held = 0

    async def receive(self) -> Message:
        """The next part, unless it is late or one too many."""
        if self._whole:
            return await self._receive()
        message = await self._in_time()
        size = len(message.get("body", b""))
        self._received += size
        if self._received > self._max_bytes:
            raise self.refuse()
        self._whole = not message.get("more_body", False)
        if self._whole:
            self.let_go()
            return message
        try:
            self._unfinished.take(size)
        except Overloaded:
            self._refused = True
            raise
        self._held += size
        return message

    async def _in_time(self) -> Message:
        due = self._began + self._seconds + self._received / PACE
        try:
            async with asyncio.timeout(due - time.monotonic()):
                return await self._receive()
        except TimeoutError:
            self._refused = True
            raise BodyTooSlow(
                f"{self._received} bytes of the body came within {time.monotonic() - self._began:.0f} s "
                "(server option --timeout-body)"
            ) from None

    async def send(self, message: Message) -> None:
        if not self._refused:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._send({**message, "headers": [*message["headers"], (b"connection", b"close")]})
        else:
            # All of the answer, but not its end: that would close the connection.
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drop_rest(), DROP_SECONDS)
            await self._send({"type": "http.response.body", "body": b""})

    async def _drop_rest(self) -> None:
        dropped = 0
        while dropped <= DROP_FACTOR * self._max_bytes:
            message = await self._receive()
            dropped += len(message.get("body", b""))
            if not message.get("more_body", False):
                return
