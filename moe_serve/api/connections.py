"""HTTP connections have limits: how many there are, how long the head and the body of a request may take.

uvicorn knows a time-out for idle connections only, and its limit of connections is one of tasks too; both live in its
protocol class, so this is a subclass of it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from moe_serve.api.errors import problem_of
from moe_serve.api.metrics import Metrics
from moe_serve.api.middleware import PACE
from moe_serve.api.orders import OPEN_PATHS
from moe_serve.base.config import ServerSection
from moe_serve.base.descriptors import raise_descriptor_limit
from moe_serve.base.errors import ConfigError, Overloaded, RefusalReason
from moe_serve.base.site import bound_socket, naming_http_port

ACCEPTED_AT_A_TIME = 64
"""asyncio accepts so many connections before any is counted, so there must be descriptors for them."""
OVERFLOW = 2 * ACCEPTED_AT_A_TIME
"""Connections beyond the limit that may still ask: whoever probes the server's health must get an answer."""
OTHER_DESCRIPTORS = 128
"""For the sockets of engines and the coordinator, files, and libraries."""
OVERFLOW_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""A body that is late is refused by whoever reads it; this is for bodies that nobody reads."""
BACKLOG = 2048
BUSY_ANSWER = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
LATE_ANSWER = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
log = logging.getLogger(__name__)


def most_connections(asked: int | None, descriptors: int) -> int:
    """How many connections are served at once. ConfigError where the limit of open files leaves no room for them."""
    room = descriptors - OTHER_DESCRIPTORS - OVERFLOW - ACCEPTED_AT_A_TIME
    if room < (asked or 1):
        raise ConfigError(
            f"{asked or 1} HTTP connections need a limit of {(asked or 1) + descriptors - room} open files, not "
            f"{descriptors} "
            "(raise the hard limit, `ulimit -Hn`, or lower --max-connections)"
        )
    return asked or room


@dataclass(slots=True)
class Connections:
    """What all connections of a server share: at most `limit` are served, and a few more are told so."""

    server: ServerSection
    limit: int
    metrics: Metrics
    held: set[LimitedConnection] = field(default_factory=set)

    def hold(self, connection: LimitedConnection) -> None:
        self.held.add(connection)
        self.metrics.connections(len(self.held))

    def let_go(self, connection: LimitedConnection) -> None:
        self.held.discard(connection)
        self.metrics.connections(len(self.held))

    def refuse(self, reason: RefusalReason, words: str, *arguments: object) -> None:
        """Count and log a connection that is ended or not served."""
        self.metrics.refused(reason)
        log.warning(words, *arguments)


class LimitedConnection(H11Protocol):
    """One connection. `shared` knows all of them."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        shared: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._shared = shared
        self._timer: asyncio.TimerHandle | None = None
        self._received = 0
        self._in_body = False
        self._overflows = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it; one too many may only ask for the server's health."""
        super().connection_made(transport)
        shared = self._shared
        self._overflows = len(shared.held) >= shared.limit
        if len(shared.held) >= shared.limit + OVERFLOW:
            self._refuse_busy()
            return
        if self._overflows:
            self.app = self._answer_busy
        shared.hold(self)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._shared.let_go(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or a body; the first of a head after an idle time start its clock."""
        self._received += len(data)
        super().data_received(data)
        self._choose_clock()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._choose_clock()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP at all: uvicorn answers it by itself."""
        self._shared.metrics.refused("malformed")
        super().send_400_response(msg)

    def _choose_clock(self) -> None:
        """One for the head, one for the body; none while an answer is made or the connection is idle."""
        state = self.conn.their_state
        if state is not h11.SEND_BODY and self._in_body:
            self._in_body = False
            self._stop_timer()
        if self.transport.is_closing():
            self._stop_timer()
        elif state is h11.SEND_BODY:
            if not self._in_body:
                self._in_body, self._received = True, 0
                self._start(self._shared.server.timeout_body + GRACE_SECONDS, self._body_is_late)
        elif state is not h11.IDLE:
            self._stop_timer()
        elif self.conn.trailing_data[0]:
            if self._timer is None:
                self._wait_for_head()
        elif self.cycle is not None:
            self._stop_timer()  # idle between requests has a time-out of uvicorn's own

    def _wait_for_head(self) -> None:
        seconds = OVERFLOW_SECONDS if self._overflows else self._shared.server.timeout_headers
        self._start(seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._timer = None
        if self._overflows:
            self._refuse_busy()
            return
        # Who has sent nothing has asked for nothing: a connection opened in advance.
        if self.conn.trailing_data[0]:
            words = "ended a connection of %s: the head of its request did not come in time (--timeout-headers)"
            self._shared.refuse("slow", words, self.client)
            self.transport.write(LATE_ANSWER)
        self.transport.close()

    def _body_is_late(self) -> None:
        self._timer = None
        earned, self._received = self._received / PACE, 0
        if earned >= 1:
            self._start(earned, self._body_is_late)
            return
        words = "ended a connection of %s: the body of its request did not come in time (--timeout-body)"
        self._shared.refuse("slow", words, self.client)
        self.transport.abort()

    def _refuse_busy(self) -> None:
        self._tell_busy()
        self._stop_timer()
        self.transport.write(BUSY_ANSWER)
        self.transport.close()

    async def _answer_busy(self, scope: Scope, receive: Receive, send: Send) -> None:
        """In place of the application: probes are answered, all else is not, and nobody stays."""

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        if scope["path"] in OPEN_PATHS:
            await self.config.loaded_app(scope, receive, send_last)
        else:
            self._tell_busy()
            busy = Overloaded("too many connections (server option --max-connections)", reason="connections")
            await problem_of(busy).response()(scope, receive, send_last)

    def _tell_busy(self) -> None:
        words = "refused a connection of %s: %d are open (--max-connections)"
        self._shared.refuse("connections", words, self.client, len(self._shared.held))

    def _start(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HttpServer(uvicorn.Server):
    """uvicorn with limited connections; many may wait for being accepted, few are accepted at a time.

    Where others accept at the same socket, one at a time: who is busy leaves the next to them.
    """

    def __init__(self, app: ASGIApp, server: ServerSection, metrics: Metrics, *, alone: bool = True) -> None:
        limit = most_connections(server.max_connections, raise_descriptor_limit())
        protocol: Any = partial(LimitedConnection, shared=Connections(server, limit, metrics))
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
                timeout_keep_alive=server.timeout_keep_alive,  # type: ignore[arg-type]
                lifespan="off",
                ws="none",
                backlog=ACCEPTED_AT_A_TIME if alone else 1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError names the port that is taken or the address that is not ours."""
    made = bound_socket(host, port)
    with naming_http_port(host, port):
        made.listen(BACKLOG)
    return made
