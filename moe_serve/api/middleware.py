"""ASGI layers in front of the routes: the key and the size of a body. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.api.errors import BodyTooLarge, Problem, problem_of

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/version"})


class RequireKey:
    """Every path but the open ones needs `Authorization: Bearer KEY`; without a key set, none does."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        if closed and self._expected is not None and not hmac.compare_digest(_bearer(scope), self._expected):
            problem = Problem(
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
        announced = _header(scope, b"content-length")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self._max_bytes):
            await problem_of(self._too_large()).response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._max_bytes} bytes (server option --max-body-bytes)")


def _bearer(scope: Scope) -> bytes:
    """The token of `Authorization: Bearer TOKEN`, or nothing."""
    scheme, _, token = _header(scope, b"authorization").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _header(scope: Scope, name: bytes) -> bytes:
    """The first value of a header, or nothing."""
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
