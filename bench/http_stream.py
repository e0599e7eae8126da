"""As much of an HTTP client as a load generator needs: server-sent events over a connection of their own.

A full client costs milliseconds of the processor per request, which here would be taken from the server.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec

from moe_serve.base.site import with_port

SILENCE_SECONDS = 120.0
DONE = b"[DONE]"


class StreamFailed(Exception):
    """The server answered with an error, or broke off. `status` and `retry_after` (seconds) where it answered."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Self:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if not parts.hostname or parts.scheme not in ("http", "https") or parts.path not in ("", "/"):
            raise ValueError(f"the address must look like http://host:port, not {url!r}")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls)


async def post_events(address: Address, path: str, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event until [DONE]. Raises StreamFailed or OSError."""
    kept = b""
    async for piece in _body(address, "POST", path, body):
        *events, kept = (kept + piece).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == DONE:
                return
            yield msgspec.json.decode(data)
    raise StreamFailed("the stream ended without [DONE]")


async def post_json(address: Address, path: str, value: object) -> Any:
    body = msgspec.json.encode(value)
    return msgspec.json.decode(b"".join([piece async for piece in _body(address, "POST", path, body)]))


async def get_json(address: Address, path: str) -> Any:
    return msgspec.json.decode(b"".join([piece async for piece in _body(address, "GET", path, b"")]))


async def _body(address: Address, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
    """Pieces of the answer's body as they arrive."""
    secure = ssl.create_default_context() if address.tls else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=secure)
    try:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {with_port(address.host, address.port)}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        async with asyncio.timeout(SILENCE_SECONDS):
            answer = await reader.readuntil(b"\r\n\r\n")
        pieces = _chunks(reader) if b"transfer-encoding: chunked" in answer.lower() else _rest(reader)
        status = int(answer.split(b" ", 2)[1])
        if status not in (200, 202):
            said = b"".join([piece async for piece in pieces])
            words = f"HTTP {status}: {said[:300].decode(errors='replace')}"
            raise StreamFailed(words, status=status, retry_after=_retry_after(answer))
        async for piece in pieces:
            yield piece
    except (asyncio.IncompleteReadError, TimeoutError) as error:
        raise StreamFailed(f"the server broke off: {type(error).__name__}") from error
    finally:
        writer.close()


def _retry_after(head: bytes) -> float | None:
    found = re.search(rb"\r\nretry-after: *([0-9.]+)", head, re.IGNORECASE)
    return float(found.group(1)) if found else None


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        async with asyncio.timeout(SILENCE_SECONDS):
            size = int(await reader.readuntil(b"\r\n"), 16)
            piece = (await reader.readexactly(size + 2))[:-2]
        if not size:
            return
        yield piece


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    yield await reader.read()
