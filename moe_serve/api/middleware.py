"""ASGI layers in front of the routes: the key and the size of a body. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.api.errors import ApiProblem, BodyTooLarge, problem_of

DROP_FACTOR = 4  # how often the limit is read and dropped of a body that was refused
DROP_SECONDS = 5.0
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/version"})


class RequireKey:
    """Every path but the open ones needs `Authorization: Bearer KEY`; without a key set, none does."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        if closed and self._expected is not None and not hmac.compare_digest(_bearer(scope), self._expected):
            problem = ApiProblem(
                401,
                "a valid API key is needed: send the header `Authorization: Bearer KEY` (server option --api-key)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await problem.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class LimitBody:
    """Refuses bodies over the limit: by their announced length at once, else as soon as too much has arrived."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limited = _LimitedExchange(receive, send, self._max_bytes)
        announced = _header(scope, b"content-length")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self._max_bytes):
            await problem_of(limited.refuse()).response()(scope, receive, limited.send)
        else:
            await self._app(scope, limited.receive, limited.send)


class _LimitedExchange:
    """One request and its response. After a refusal the rest of the body is read and dropped for a while before the
    connection is closed: clients that write first and read then would see a broken connection instead of the answer.
    """

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._received = 0
        self._refused = False

    def refuse(self) -> BodyTooLarge:
        self._refused = True
        return BodyTooLarge(f"the body is larger than {self._max_bytes} bytes (server option --max-body-bytes)")

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._max_bytes:
            raise self.refuse()
        return message

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


def _bearer(scope: Scope) -> bytes:
    """The token of `Authorization: Bearer TOKEN`, or nothing."""
    scheme, _, token = _header(scope, b"authorization").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _header(scope: Scope, name: bytes) -> bytes:
    """The first value of a header, or nothing."""
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
